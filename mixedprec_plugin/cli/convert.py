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
    TaskID,
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

    form = _form(args.format)
    with _ProgressBar(sys.stderr) as bar:
        done = convert(
            plan, form, Path(args.out), parse_size(args.max_shard_size),
            overwrite=args.overwrite, watcher=bar,
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


class _ProgressBar:
    """Bytes, speed and time left; nothing where `err` is no terminal."""

    def __init__(self, err: TextIO) -> None:
        self._progress = Progress(
            TextColumn("converting"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(file=err),
            disable=not err.isatty(),
        )
        self._task = TaskID(0)

    def __enter__(self) -> _ProgressBar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def start(self, num_bytes: int) -> None:
        """Begin with the bytes of all parts."""
        self._task = self._progress.add_task("", total=num_bytes)

    def advance(self, num_bytes: int) -> None:
        """Count more bytes as done."""
        self._progress.advance(self._task, num_bytes)
