"""What every verb writes besides its own result: JSON, problems and progress."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from mixedprec_plugin.errors import ConvertError, Problem, UsageError, printable
from mixedprec_plugin.plan.tables import styled

if TYPE_CHECKING:
    from rich.progress import Progress


def print_json(value: Any, out: TextIO) -> None:
    """Print plain data, or dataclasses in it, as JSON, which has no control character in it."""
    text = json.dumps(value, indent=1, default=_plain)
    print(text.replace("\x7f", "\\u007f"), file=out)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return str(value)


def write_new(path: Path, text: str) -> None:
    """Write a file that is not there yet."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        is_there = isinstance(error, FileExistsError)
        if not is_there:  # no part of a file stays
            with contextlib.suppress(OSError):
                path.unlink()
        what = "already exists" if is_there else f"cannot be written ({error.strerror})"
        raise ConvertError(Problem(str(path), what, "name another file", "file")) from error


def check_plot(path: Path | None) -> None:
    """See before any work that what draws is there."""
    if path is not None and importlib.util.find_spec("matplotlib") is None:
        remedy = "pip install 'mixedprec-plugin[plot]'"
        raise UsageError(Problem("--plot", "matplotlib is not installed", remedy))


def save_plot(figure: Any, path: Path) -> None:
    """Write a figure of matplotlib's, in the format that the file's name says."""
    try:
        figure.savefig(path)
    except (ValueError, OSError) as error:
        raise UsageError(Problem("--plot", f"{path} cannot be written ({error})")) from error


def report(problems: Iterable[Problem], err: TextIO) -> None:
    """Print problems, a line each."""
    for problem in problems:
        style = "red" if problem.severity == "error" else "yellow"
        text = printable(f"{problem}; see {problem.asked_at}" if problem.asked_at else f"{problem}")
        print("mixedprec:", styled(f"{problem.severity}:", style, err), text, file=err)


def progress_for(args: argparse.Namespace) -> Progress:
    """What is done, how much of it and the time left; nothing where nobody is watching."""
    from rich import console, progress

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TimeRemainingColumn(),
        console=console.Console(file=sys.stderr),
        disable=args.quiet or not sys.stderr.isatty(),
    )
