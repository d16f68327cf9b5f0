"""`mixedprec plan`: what every layer of a checkpoint would run as; reads headers only."""

from __future__ import annotations

import argparse
import json
from typing import TextIO

from rich.console import Console

from mixedprec_plugin.cli.planning import add_planning_arguments, make_plan
from mixedprec_plugin.plan.render import plan_as_dict, print_plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_planning_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace, out: TextIO) -> int:
    """Print the plan.

    Returns:
        0 where the preset fits the checkpoint, 1 where it does not.
    Raises:
        UsageError: no preset was named, and the checkpoint carries none.
        PresetError, CheckpointError: the files themselves are wrong.
    """
    plan = make_plan(args)
    if args.json:
        print(json.dumps(plan_as_dict(plan), indent=1), file=out)
    else:
        width = None if out.isatty() else 160
        print_plan(plan, Console(file=out, width=width, soft_wrap=False))
    return 1 if plan.errors else 0
