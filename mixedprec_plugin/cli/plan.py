"""`mixedprec plan`: what every layer of a checkpoint would run as; reads headers only."""

from __future__ import annotations

import argparse
import json
from typing import TextIO

from rich.console import Console

from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.checkpoint.sources import open_other_sources
from mixedprec_plugin.plan.dtype import model_dtype
from mixedprec_plugin.plan.model import Target
from mixedprec_plugin.plan.render import plan_as_dict, print_plan
from mixedprec_plugin.plan.resolve import resolve_plan
from mixedprec_plugin.preset.load import load_preset


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint folder")
    parser.add_argument(
        "--preset", required=True, metavar="PRESET", help="YAML file, or a packaged preset's name"
    )
    parser.add_argument(
        "--mixedprec-set", "--set", dest="overrides", metavar="KEY=VALUE", action="append",
        default=[], help="override a key of the preset; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--tp", type=_positive, default=1, metavar="N", help="tensor-parallel ranks"
    )
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16 or float16, as SGLang's")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="what to plan for"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def run(args: argparse.Namespace, out: TextIO) -> int:
    """Print the plan.

    Returns:
        0 where the preset fits the checkpoint, 1 where it does not.
    Raises:
        PresetError, CheckpointError: the files themselves are wrong.
    """
    preset = load_preset(args.preset, args.overrides)
    source = open_source(args.model)
    target = Target(args.device, args.tp, model_dtype(source.config, args.dtype))
    plan = resolve_plan(preset, source, target, open_other_sources(preset))
    if args.json:
        print(json.dumps(plan_as_dict(plan), indent=1), file=out)
    else:
        width = None if out.isatty() else 160
        print_plan(plan, Console(file=out, width=width, soft_wrap=False))
    return 1 if plan.errors else 0
