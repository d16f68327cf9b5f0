"""`mixedprec convert`: write what a preset makes of a checkpoint to disk."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from mixedprec_plugin.cli.planning import add_planning_arguments, make_plan
from mixedprec_plugin.errors import printable
from mixedprec_plugin.plan.render import format_bytes

if TYPE_CHECKING:
    from mixedprec_plugin.convert.form import Form

_FORMATS = ("mixedprec", "compressed-tensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_planning_arguments(parser)
    parser.add_argument(
        "--out", required=True, metavar="DIR",
        help="new folder; if an earlier run of the same command was stopped, it is continued",
    )  # fmt: skip
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="most bytes of a file (5GB)"
    )
    parser.add_argument(
        "--format", choices=_FORMATS, default="mixedprec",
        help="compressed-tensors: for stock SGLang and vLLM, where the plan can be written so",
    )  # fmt: skip
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what another conversion wrote to DIR"
    )


def run(args: argparse.Namespace, out: TextIO) -> int:
    """Write the checkpoint; progress goes to standard error where that is a terminal.

    Returns:
        0.
    Raises:
        UsageError, PresetError, CheckpointError, PlanError: before anything is written.
        ConvertError: the folder is in the way, or cannot be written.
    """
    plan = make_plan(args).check()
    # the verbs that only read run without torch
    from mixedprec_plugin.convert.converter import convert
    from mixedprec_plugin.convert.parts import parse_size

    size = parse_size(args.max_shard_size)
    with plan.preset.concealing(), _progress(sys.stderr) as bar:
        task = bar.add_task("", total=None)
        done = convert(
            plan, _form(args.format), Path(args.out), size, overwrite=args.overwrite,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    kept = f", {done.num_kept} of them from before" if done.num_kept else ""
    files = f"{done.num_parts} file{'s' if done.num_parts > 1 else ''}"
    print(f"{printable(args.out)}: {format_bytes(done.num_bytes)} in {files}{kept}", file=out)
    return 0


def _form(name: str) -> Form:
    if name == "compressed-tensors":
        from mixedprec_plugin.convert.compressed import CompressedForm

        return CompressedForm()
    from mixedprec_plugin.convert.form import MixedForm

    return MixedForm()


def _progress(err: TextIO) -> Progress:
    """Bytes, speed and time left; nothing where `err` is no terminal."""
    return Progress(
        TextColumn("converting"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(file=err),
        disable=not err.isatty(),
    )
