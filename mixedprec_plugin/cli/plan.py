"""`mixedprec plan`: what every layer of a checkpoint would run as; reads headers only."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from mixedprec_plugin.cli.build import with_build
from mixedprec_plugin.cli.output import print_json
from mixedprec_plugin.cli.planning import add_planning_arguments, make_draft_plan, make_plan
from mixedprec_plugin.errors import Problem
from mixedprec_plugin.plan.render import plan_as_dict, print_plan
from mixedprec_plugin.plan.tables import Page

EXAMPLES = """
  mixedprec plan --model DIR --preset awq
  mixedprec plan --model Qwen/Qwen3-30B-A3B --preset mine.yaml --gpu 4090 --tp 2
  mixedprec plan --model DIR --preset mine.yaml --set schemes.mlp.group_size=64 --json
  mixedprec plan --model DIR --preset mine.yaml --gpu H100 --html plan.html --against awq
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_planning_arguments(parser)
    parser.add_argument(
        "--draft-model", metavar="DIR",
        help="checkpoint of the draft model, to plan the preset's section draft over as well",
    )  # fmt: skip
    parser.add_argument(
        "--build", action="store_true",
        help="build SGLang's model without weights as well, and hold the plan against it",
    )  # fmt: skip
    parser.add_argument(
        "--html", type=Path, metavar="FILE",
        help="write the plan as one page to look at, and to try other methods in",
    )  # fmt: skip
    parser.add_argument(
        "--svg", type=Path, metavar="FILE", help="write a map of its bytes for a report"
    )
    parser.add_argument(
        "--against", default="", metavar="PRESET",
        help="with --html: another preset beside it, or the address of a server that runs",
    )  # fmt: skip
    parser.add_argument(
        "--overlay", type=Path, metavar="FILE", action="append", default=[],
        help="with --html: what verify --json printed, search's scores, or a folder of convert "
        "--calibrate, to colour layers by; repeatable",
    )  # fmt: skip


def run(args: argparse.Namespace, out: TextIO) -> Sequence[Problem]:
    """Print the plan; return what does not fit, and warnings."""
    plan = make_plan(args)
    draft = make_draft_plan(args, plan)
    if args.build:
        plan, *drafts = with_build(args, [plan] + ([draft] if draft else []))
        draft = drafts[0] if drafts else None
    if args.html or args.svg or args.against or args.overlay:
        from mixedprec_plugin.cli.page import write_pages

        write_pages(args, plan)
    page = Page(out)
    if args.json:
        print_json(plan_as_dict(plan) | ({"draft": plan_as_dict(draft)} if draft else {}), out)
    else:
        print_plan(plan, page)
    if draft is not None and not args.json:
        own = "" if args.draft_model else ", of the model's own layers"
        page.print(f"\nThe draft model{own}:")
        print_plan(draft, page)
    elif plan.preset.draft is not None and not args.json:
        page.print("The preset has a section draft; --draft-model DIR plans it.")
    return (*plan.problems, *(draft.problems if draft else ()))
