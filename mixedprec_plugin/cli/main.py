"""`mixedprec VERB …`; the one place that turns errors into exit codes.

Exit codes: 0 fine, 1 what was asked does not fit, 2 the command line is wrong, 130 interrupted.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import TextIO

from mixedprec_plugin import __version__
from mixedprec_plugin.cli.arguments import Parser
from mixedprec_plugin.cli.output import print_json, report
from mixedprec_plugin.errors import MixedPrecisionError, Problem, UsageError
from mixedprec_plugin.names import nearest

# verb -> (module, help). The module has
#   add_arguments(parser)
#   run(args, out) -> the exit code; or the problems that were found, which main prints. It raises
#                     any of the package's errors
#   EXAMPLES, commands for --help
VERBS = {
    "init": ("mixedprec_plugin.cli.init", "a preset to start from, for a model and a size"),
    "plan": ("mixedprec_plugin.cli.plan", "what every layer of a checkpoint would run as"),
    "explain": ("mixedprec_plugin.cli.explain", "why a layer runs as it does"),
    "diff": ("mixedprec_plugin.cli.diff", "what two presets, folders or servers make different"),
    "inspect": ("mixedprec_plugin.cli.inspect", "how every layer of a checkpoint is stored"),
    "serve": ("mixedprec_plugin.cli.serve", "check first, then start SGLang's server"),
    "convert": ("mixedprec_plugin.cli.convert", "write the mixed checkpoint to disk"),
    "verify": ("mixedprec_plugin.cli.verify", "is the mixed checkpoint still the model"),
    "eval": ("mixedprec_plugin.cli.eval", "what presets cost in quality"),
    "search": ("mixedprec_plugin.cli.search", "the best preset for a budget of memory"),
    "presets": ("mixedprec_plugin.cli.presets", "the presets that ship: list, show, copy"),
    "validate": ("mixedprec_plugin.cli.validate", "are preset files right in themselves"),
    "methods": ("mixedprec_plugin.cli.methods", "the quantization methods and their arguments"),
    "schema": ("mixedprec_plugin.cli.schema", "the JSON Schema of presets, for editors"),
    "completion": ("mixedprec_plugin.cli.completion", "a script for bash, zsh or fish"),
    "cache": ("mixedprec_plugin.cli.cache", "layers that are kept for the next start"),
    "doctor": ("mixedprec_plugin.cli.doctor", "is everything registered and does it fit SGLang"),
}

_TITLE = "Mixed-precision serving with SGLang by editing a YAML file."


def main(
    argv: Sequence[str] | None = None, out: TextIO | None = None, err: TextIO | None = None
) -> int:
    """Run words, the process's own if None, write results and errors, and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    # Python has no stream where the shell closed one
    out, err = out or sys.stdout or io.StringIO(), err or sys.stderr or io.StringIO()
    for stream in (out, err):
        if isinstance(stream, io.TextIOWrapper):  # what its encoding lacks is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _run_or_report(words, out, err)
        out.flush()
    except KeyboardInterrupt:
        print("mixedprec: interrupted", file=err)
        return 130
    except OSError as error:
        if out is sys.stdout:  # what it still holds is not tried again at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 0
        where, what = str(error.filename or "the output"), error.strerror or str(error)
        report([Problem(where, f"cannot be read or written ({what})")], err)
        return 1
    return code


def parser_of(verb: str) -> Parser:
    """The parser of a verb's arguments."""
    name, summary = VERBS[verb]
    module = importlib.import_module(name)
    parser = Parser(prog=f"mixedprec {verb}", description=f"{summary[0].upper()}{summary[1:]}.")
    if examples := getattr(module, "EXAMPLES", ""):
        parser.epilog = f"examples:\n{examples.strip(chr(10))}"
    module.add_arguments(parser)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="print JSON")
    how.add_argument(
        "-q", "--quiet", action="store_true", help="print errors alone; the exit code tells"
    )
    return parser


def _run_or_report(words: Sequence[str], out: TextIO, err: TextIO) -> int:
    try:
        return _run(words, out, err)
    except MixedPrecisionError as error:
        if "--json" in words:
            print_json({"problems": error.problems}, out)
        else:
            report(error.problems, err)
        return 2 if isinstance(error, UsageError) else 1


def _run(words: Sequence[str], out: TextIO, err: TextIO) -> int:
    verb = words[0] if words else ""
    if verb in VERBS:
        try:
            args = parser_of(verb).parse_args(words[1:])
        except SystemExit:  # --help was printed
            return 0
        found = importlib.import_module(VERBS[verb][0]).run(
            args, io.StringIO() if args.quiet else out
        )
        if isinstance(found, int):
            return found
        errors = [problem for problem in found if problem.severity == "error"]
        if not args.json:
            report(errors if args.quiet else found, err)
        return 1 if errors else 0
    if verb in ("-V", "--version"):
        print(__version__, file=out)
        return 0
    if verb in ("-h", "--help", "help"):
        _print_help(out)
        return 0
    if not verb:
        _print_help(err)
        return 2
    near = nearest(verb, VERBS)
    remedy = f"did you mean {' or '.join(map(repr, near))}?" if near else "see mixedprec --help"
    raise UsageError(Problem("", f"unknown verb {verb!r} (expected {', '.join(VERBS)})", remedy))


def _print_help(out: TextIO) -> None:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:{width}}  {summary}" for verb, (_, summary) in VERBS.items())
    print(f"usage: mixedprec VERB …\n\n{_TITLE}\n\n{verbs}\n", file=out)
    print("mixedprec VERB --help explains a verb, with examples.", file=out)
