"""`mixedprec search`: the preset of the best quality for a budget of memory."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TextIO

from mixedprec_plugin.cli.arguments import positive
from mixedprec_plugin.cli.output import check_plot
from mixedprec_plugin.cli.planning import (
    add_load_arguments,
    add_model_argument,
    add_target_arguments,
    add_text_arguments,
    given,
    load_of,
)
from mixedprec_plugin.errors import Problem, UsageError
from mixedprec_plugin.search.kept import Basis

EXAMPLES = """
  mixedprec search --model DIR --bits 4.5 --out mine.yaml
  mixedprec search --model DIR --gpu RTX4090 --context 32k --concurrency 16 --out mine.yaml
  mixedprec search --model DIR --budget 12GiB --tp 2 --sources all.yaml --out mine.yaml
  mixedprec search --model DIR --bits 5 --inputs FOLDER --out mine.yaml
"""

# arguments that say what scores are made on
TEXT = ("text", "windows", "length", "seed", "held_out")
_BASIS = Basis()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    wanted = parser.add_argument_group("budget", "one of these, or --gpu with --context")
    wanted.add_argument(
        "--bits", type=float, metavar="N", help="bits a weight of linear layers, scales counted"
    )
    wanted.add_argument(
        "--budget", metavar="SIZE",
        help="bytes of weights on each rank, everything counted: 12GiB",
    )  # fmt: skip
    add_load_arguments(wanted)
    add_target_arguments(parser)
    parser.add_argument(
        "--methods", default="", metavar="LIST", help="what to choose from, as awq,fp8; all if none"
    )
    parser.add_argument(
        "--sources", type=Path, metavar="FILE",
        help="a preset whose sources are chosen from as well, each layer as it is stored there",
    )  # fmt: skip
    parser.add_argument(
        "--at-load", action="store_true",
        help="choose from what needs no conversion: 4-bit layers are rounded to the nearest code",
    )  # fmt: skip
    parser.add_argument(
        "--experts", choices=("single", "layer"), default="single",
        help="whether each expert is chosen for, or all of a layer together",
    )  # fmt: skip
    scored = parser.add_argument_group("scores", "made once, and kept for the next search")
    add_text_arguments(scored, "score on", "the model", _BASIS.windows, _BASIS.length)
    scored.add_argument(
        "--held-out", type=positive, metavar="N", help="pieces to score on (16)",
    )  # fmt: skip
    scored.add_argument(
        "--no-gradients", action="store_true",
        help="score by errors of outputs, for models that cannot be differentiated",
    )  # fmt: skip
    scored.add_argument(
        "--inputs", type=Path, metavar="FOLDER",
        help="score by errors of outputs, on what the layers of a server with --mixedprec-inputs "
        "FOLDER read",
    )  # fmt: skip
    scored.add_argument(
        "--in-engine", action="store_true",
        help="score by KL of single units, measured in a server that is started for it; "
        "with --at-load",
    )  # fmt: skip
    scored.add_argument(
        "--fast", action="store_true", help="no scores: a rule of thumb from shapes alone"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the preset, YAML")
    parser.add_argument(
        "--convert", type=Path, metavar="DIR", help="write the model so, calibrated, as well"
    )
    parser.add_argument(
        "--check", action="store_true",
        help="measure the preset on text that nothing was chosen on, as mixedprec eval does",
    )  # fmt: skip
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw front and layers, as SVG")


def run(args: argparse.Namespace, out: TextIO) -> int:
    """Find and write the preset."""
    _check_options(args)
    check_plot(args.plot)
    # other verbs run without numpy and scipy
    from mixedprec_plugin.cli.searching import search

    search(args, out)
    return 0


def _check_options(args: argparse.Namespace) -> None:
    """See that the options go together.

    Raises:
        UsageError: they do not.
    """
    wanted = given(args, "bits", "budget", "context")
    if len(wanted) != 1:
        what = f"{' and '.join(f'--{x}' for x in wanted) or 'none of them'} (expected one)"
        remedy = "name one of --bits N, --budget SIZE, or --gpu NAME --context TOKENS"
        raise UsageError(Problem("--bits, --budget, --context", what, remedy, "budget"))
    if args.context is not None and not args.gpu:
        remedy = "add --gpu NAME, or give --budget"
        raise UsageError(Problem("--context", "is for a GPU", remedy, "budget"))
    load_of(args)
    unused = [f"--{x.replace('_', '-')}" for x in given(args, *TEXT)]
    if args.inputs and unused:
        what = "is for text, and --inputs is there in its place"
        raise UsageError(Problem(", ".join(unused), what))
    others = ("no_gradients", "inputs", "in_engine")
    ways = [f"--{x.replace('_', '-')}" for x in others if getattr(args, x)]
    if len(ways) > 1:
        what = "are ways to make scores (expected one)"
        raise UsageError(Problem(", ".join(ways), what))
    if args.in_engine and not args.at_load:
        what = "measures no candidate that needs a conversion"
        raise UsageError(Problem("--in-engine", what, "add --at-load"))
    if args.in_engine and args.windows is not None:
        what = "is for what candidates are made on, and --in-engine makes none"
        raise UsageError(Problem("--windows", what, "say with --held-out how many are measured"))
    unused += ways
    if args.fast and unused:
        raise UsageError(Problem(", ".join(unused), "is for scores, and --fast makes none"))
