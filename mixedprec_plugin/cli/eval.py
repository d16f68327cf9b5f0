"""`mixedprec eval`: what presets cost, as the divergence from the unquantized model."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.cli.output import print_json, progress_for
from mixedprec_plugin.cli.planning import add_planning_arguments, add_text_arguments, make_plan
from mixedprec_plugin.errors import PlanError
from mixedprec_plugin.plan.model import Plan
from mixedprec_plugin.plan.tables import Page

if TYPE_CHECKING:
    from mixedprec_plugin.evaluate.report import Row


_WINDOWS, _LENGTH = 8, 512

EXAMPLES = """
  mixedprec eval --model DIR --preset awq --preset fp8-block
  mixedprec eval --model DIR-awq --reference DIR --text FILE
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_planning_arguments(parser, several=True)
    parser.add_argument(
        "--reference", default="", metavar="MODEL",
        help="the unquantized model, if --model is not it: folder or Hugging Face id",
    )  # fmt: skip
    add_text_arguments(parser, "predict", "the reference", _WINDOWS, _LENGTH)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw divergence against bits")


def run(args: argparse.Namespace, out: TextIO) -> int:
    """Compare the predictions of presets and converted folders with the unquantized model's.

    Returns:
        0.
    Raises:
        UsageError, PresetError, CheckpointError, PlanError: before the work.
    """
    plans = {name or args.model: _plan(args, name) for name in args.presets or [""]}
    # the verbs that only read run without torch
    from mixedprec_plugin.evaluate.report import as_dict, draw, evaluate, print_rows

    reference = open_source(args.reference or args.model)
    with (
        tempfile.TemporaryDirectory(prefix="mixedprec-eval-") as folder,
        progress_for(args) as bar,
    ):
        rows: list[Row] = evaluate(
            plans,
            reference,
            args.text,
            args.windows or _WINDOWS,
            args.length or _LENGTH,
            args.seed or 0,
            Path(folder),
            bar,
        )
    if args.plot:
        draw(rows, args.plot)
    if args.json:
        print_json(as_dict(rows, args.text), out)
    else:
        print_rows(rows, args.text, Page(out))
    return 0


def _plan(args: argparse.Namespace, preset: str) -> Plan:
    named = {"model": preset, "preset": ""} if Path(preset or "-").is_dir() else {"preset": preset}
    plan = make_plan(argparse.Namespace(**{**vars(args), **named})).check()
    if problems := plan.not_calibrated():
        raise PlanError(problems)
    return plan
