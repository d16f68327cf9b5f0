"""`mixedprec verify`: is what a preset makes of a checkpoint still the model?"""

from __future__ import annotations

import argparse
from typing import TextIO

from mixedprec_plugin.cli.planning import add_planning_arguments, make_plan, print_json
from mixedprec_plugin.plan.render import console_for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_planning_arguments(parser)
    parser.add_argument(
        "--reference", required=True, metavar="SOURCE",
        help="what the layers are compared with: a source of the preset, or a checkpoint folder",
    )  # fmt: skip
    parser.add_argument(
        "--threshold", metavar="METHOD=VALUE", action="append", default=[],
        help="largest relative RMS error of a method's layers; repeatable",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace, out: TextIO) -> int:
    """Compose every layer, compare it with the reference, and print the worst.

    Returns:
        0, or 1 where a layer is further from its reference than its method explains, or could not
        be compared.
    Raises:
        UsageError, PresetError, CheckpointError, PlanError: before the work.
    """
    plan = make_plan(args).check()
    # the verbs that only read run without torch
    from mixedprec_plugin.checkpoint.reader import Reader
    from mixedprec_plugin.verify.report import comparison_as_dict, print_comparisons, worst_first
    from mixedprec_plugin.verify.thresholds import parse_thresholds
    from mixedprec_plugin.verify.verifier import Verifier, reference_of

    limits = parse_thresholds(args.threshold)
    with Reader() as reader:
        verifier = Verifier(plan, reference_of(args.reference, plan), limits, reader)
        found = verifier.compare_all()
    if args.json:
        layers = [comparison_as_dict(one) for one in worst_first(found)]
        print_json({"layers": layers}, out)
    else:
        print_comparisons(found, console_for(out))
    return 1 if any(one.is_too_far or one.distance is None for one in found) else 0
