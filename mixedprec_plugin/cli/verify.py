"""`mixedprec verify`: is what a preset makes of a checkpoint still the model?"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TextIO

from mixedprec_plugin.cli.output import print_json
from mixedprec_plugin.cli.planning import add_planning_arguments, make_plan
from mixedprec_plugin.errors import Problem
from mixedprec_plugin.plan.tables import Page

EXAMPLES = """
  mixedprec verify --model DIR --preset awq --reference DIR
  mixedprec verify --model DIR-awq --reference DIR
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_planning_arguments(parser)
    parser.add_argument(
        "--reference", required=True, metavar="SOURCE",
        help="what the layers are compared with: a source of the preset, or a checkpoint folder",
    )  # fmt: skip
    parser.add_argument(
        "--threshold", metavar="METHOD=VALUE", action="append", default=[],
        help="largest relative RMS error of a method's layers; repeatable",
    )  # fmt: skip


def run(args: argparse.Namespace, out: TextIO) -> Sequence[Problem]:
    """Compose every layer, compare it with the reference, and print the worst.

    Returns:
        errors of layers that are further from their reference than their method explains, or were
        not compared; warnings of those that it rounds badly.
    """
    plan = make_plan(args).servable().check()
    # the verbs that only read run without torch
    from mixedprec_plugin.checkpoint.reader import Reader, Reading
    from mixedprec_plugin.verify.report import (
        comparison_as_dict,
        print_comparisons,
        summary,
        worst_first,
    )
    from mixedprec_plugin.verify.thresholds import parse_thresholds
    from mixedprec_plugin.verify.verifier import Verifier, check_recorded, reference_of

    limits = parse_thresholds(args.threshold)
    # no mapping: what is cut off while it is compared would end the process
    with plan.preset.concealing(), Reader(Reading(may_map=False)) as reader:
        reference = reference_of(args.reference, plan)
        check_recorded(plan, reference)
        found = Verifier(plan, reference, limits, reader).compare_all()
        for source in (*plan.sources.values(), reference):
            source.check_unchanged()
    if args.json:
        layers = [comparison_as_dict(one) for one in worst_first(found)]
        print_json({"layers": layers, "problems": summary(found)}, out)
    else:
        print_comparisons(found, Page(out))
    return summary(found)
