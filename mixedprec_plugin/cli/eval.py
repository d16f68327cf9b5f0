"""`mixedprec eval`: what presets cost, as the divergence from the unquantized model."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.cli.output import check_plot, print_json, progress_for, save_plot
from mixedprec_plugin.cli.planning import (
    add_planning_arguments,
    add_text_arguments,
    make_named_plan,
)
from mixedprec_plugin.errors import Problem, UsageError
from mixedprec_plugin.plan.model import Plan
from mixedprec_plugin.plan.tables import Page

if TYPE_CHECKING:
    from mixedprec_plugin.evaluate.report import Servers

_WINDOWS, _LENGTH = 8, 512

EXAMPLES = """
  mixedprec eval --model DIR --preset awq --preset fp8-block
  mixedprec eval --model DIR-awq --reference DIR --text FILE
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_planning_arguments(parser, several=True)
    parser.add_argument(
        "--reference", default="", metavar="MODEL",
        help="the unquantized model, if --model is not it: folder or Hugging Face id",
    )  # fmt: skip
    add_text_arguments(parser, "predict", "the reference", _WINDOWS, _LENGTH)
    parser.add_argument(
        "--engine", choices=("transformers", "sglang"), default="transformers",
        help="sglang: start a server for each, and one of the unquantized model for the noise of "
        "its kernels",
    )  # fmt: skip
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw divergence against bits")


def run(args: argparse.Namespace, out: TextIO) -> int:
    """Compare the predictions of presets and converted folders with the unquantized model's."""
    check_plot(args.plot)
    plans = {
        name or args.model: make_named_plan(args, name).servable().check()
        for name in args.presets or [""]
    }
    # the verbs that only read run without torch
    from mixedprec_plugin.evaluate.report import as_dict, draw, evaluate, print_rows

    reference = open_source(args.reference or args.model)
    is_served = args.engine == "sglang"
    servers = _servers(args, plans, reference.path) if is_served else None
    with tempfile.TemporaryDirectory(prefix="mixedprec-eval-") as folder, progress_for(args) as bar:
        rows = evaluate(
            plans, reference, args.text, args.windows or _WINDOWS, args.length or _LENGTH,
            args.seed or 0, Path(folder), bar, servers,
        )  # fmt: skip
    if args.plot:
        save_plot(draw(rows), args.plot)
    if args.json:
        print_json(as_dict(rows, args.text, is_served=is_served), out)
    else:
        print_rows(rows, args.text, Page(out), is_served=is_served)
    return 0


def _servers(args: argparse.Namespace, plans: Mapping[str, Plan], reference: Path) -> Servers:
    """How the reference and each plan are served, as they were planned."""
    import torch

    from mixedprec_plugin.evaluate.report import UNQUANTIZED
    from mixedprec_plugin.evaluate.server import Server

    if args.device == "cuda" and not torch.cuda.is_available():
        what = "cuda is not there (expected a GPU, to serve what is planned for one)"
        raise UsageError(Problem("--device", what, "add --device cpu"))
    flags = ["--device", args.device, "--tp-size", str(args.tp), "--dtype", args.dtype]
    ours = ["--load-format", "mixedprec"]
    for override in args.overrides:
        ours += ["--mixedprec-set", override]
    servers = {UNQUANTIZED: partial(Server, reference, flags=flags, is_quiet=True)}
    for name, plan in plans.items():
        is_preset = bool(args.presets) and not Path(name).is_dir()
        preset = ["--mixedprec-config", name] if is_preset else []
        servers[name] = partial(
            Server, plan.source.path, flags=[*flags, *ours, *preset], is_quiet=True
        )
    return servers
