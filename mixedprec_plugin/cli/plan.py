"""`mixedprec plan`: what every layer of a checkpoint would run as; reads headers only."""

from __future__ import annotations

import argparse
from typing import TextIO

from mixedprec_plugin.cli.build import with_build
from mixedprec_plugin.cli.planning import (
    add_planning_arguments,
    make_draft_plan,
    make_plan,
    print_json,
)
from mixedprec_plugin.plan.render import console_for, plan_as_dict, print_plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_planning_arguments(parser)
    parser.add_argument(
        "--draft-model", metavar="DIR",
        help="checkpoint of the draft model, to plan the preset's section draft over as well",
    )  # fmt: skip
    parser.add_argument(
        "--build", action="store_true",
        help="build SGLang's model without weights as well, and hold the plan against it",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace, out: TextIO) -> int:
    """Print the plan.

    Returns:
        0 where the preset fits the checkpoint, 1 where it does not.
    Raises:
        UsageError: no preset was named, and the checkpoint carries none; or a draft model was
            named, and the preset has no section for it.
        PresetError, CheckpointError: the files themselves are wrong.
        LoadError: the process of --build died.
    """
    plan = make_plan(args)
    draft = make_draft_plan(args, plan) if args.draft_model else None
    if args.build:
        plan, *drafts = with_build(args, [plan] + ([draft] if draft else []))
        draft = drafts[0] if drafts else None
    if args.json:
        made = plan_as_dict(plan) | ({"draft": plan_as_dict(draft)} if draft else {})
        print_json(made, out)
        return 1 if plan.errors or (draft and draft.errors) else 0
    console = console_for(out)
    print_plan(plan, console)
    if draft is not None:
        console.print("\nThe draft model:")
        print_plan(draft, console)
    elif plan.preset.draft is not None:
        console.print("The preset has a section draft; --draft-model DIR plans it.", markup=False)
    return 1 if plan.errors or (draft and draft.errors) else 0
