"""`mixedprec VERB …`; the one place that turns errors into exit codes.

Exit codes: 0 fine, 1 what was asked does not fit, 2 the command line is wrong.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import io
import sys
from collections.abc import Sequence
from typing import TextIO

from mixedprec_plugin import __version__
from mixedprec_plugin.errors import MixedPrecisionError, UsageError

# verb -> (module with add_arguments(parser) and run(args, out) -> exit code, help)
_VERBS = {
    "plan": ("mixedprec_plugin.cli.plan", "what every layer of a checkpoint would run as"),
    "inspect": ("mixedprec_plugin.cli.inspect", "how every layer of a checkpoint is stored"),
    "convert": ("mixedprec_plugin.cli.convert", "write the mixed checkpoint to disk"),
    "verify": ("mixedprec_plugin.cli.verify", "is the mixed checkpoint still the model"),
    "eval": ("mixedprec_plugin.cli.eval", "what presets cost in quality"),
    "presets": ("mixedprec_plugin.cli.presets", "the presets that ship"),
    "doctor": ("mixedprec_plugin.cli.doctor", "is everything registered and does it fit SGLang"),
}


def main(
    argv: Sequence[str] | None = None, out: TextIO | None = None, err: TextIO | None = None
) -> int:
    """Run the command line.

    Args:
        argv: arguments after the program's name; the process's own if None.
        out: where results go; standard output if None.
        err: where errors go; standard error if None.
    Returns:
        the exit code.
    """
    out, err = out or sys.stdout, err or sys.stderr
    for stream in (out, err):
        if isinstance(stream, io.TextIOWrapper):  # what its encoding lacks is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    parser = _parser()
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        return int(importlib.import_module(_VERBS[args.verb][0]).run(args, out))
    except UsageError as error:
        _print_problems(error, err)
        return 2
    except MixedPrecisionError as error:
        _print_problems(error, err)
        return 1
    except BrokenPipeError:
        return 0


@functools.cache
def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mixedprec", description="Mixed-precision serving with SGLang by editing a YAML file."
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, (module, summary) in _VERBS.items():
        child = verbs.add_parser(verb, help=summary, description=summary)
        importlib.import_module(module).add_arguments(child)
    return parser


def _print_problems(error: MixedPrecisionError, err: TextIO) -> None:
    for problem in error.problems:
        print(f"mixedprec: {problem.severity}: {problem}", file=err)
