"""`mixedprec init`: a preset to start from, for one model and one size."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import TextIO

from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.cli.output import print_json, write_new
from mixedprec_plugin.cli.planning import gpu_of, target_of
from mixedprec_plugin.cli.presets import MODELINE
from mixedprec_plugin.convert.parts import parse_size
from mixedprec_plugin.errors import PlanError
from mixedprec_plugin.methods.cards import Gpu
from mixedprec_plugin.plan.memory import why_not_in_memory
from mixedprec_plugin.plan.model import Plan
from mixedprec_plugin.plan.render import totals, totals_line
from mixedprec_plugin.plan.tables import Page
from mixedprec_plugin.preset.schema import PRESET_SCHEMA
from mixedprec_plugin.resources import schema_path

EXAMPLES = """
  mixedprec init --model DIR --fit 24GB --out mine.yaml
  mixedprec init --model Qwen/Qwen3-30B-A3B --bits 4.5 --gpu 4090
"""
# of a card, for weights; the rest is for activations, CUDA graphs and the KV cache
_SHARE = 0.75


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "--model", required=True, metavar="MODEL", help="checkpoint folder, or a Hugging Face id"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--fit", metavar="SIZE", help="memory of the card of each rank, as 24GB")
    size.add_argument(
        "--bits", type=float, metavar="N", help="bits a weight of linear layers, as 4.5"
    )
    parser.add_argument("--gpu", default="", metavar="NAME", help="card to fit, as H100 or 8.9")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="tensor-parallel ranks")
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16 or float16, as SGLang's")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="what it is for")
    parser.add_argument("--out", metavar="FILE", help="where to write it; else it is printed")


def run(args: argparse.Namespace, out: TextIO) -> int:
    """Write a commented preset that fits the model.

    Returns:
        0.
    Raises:
        UsageError: a size is none, or nothing serves the model.
        CheckpointError: the model's files are wrong.
        PlanError: nothing fits.
        ConvertError: the file is there already.
    """
    # needs numpy and scipy
    from mixedprec_plugin.cli.initial import preset_for
    from mixedprec_plugin.search.finder import Budget

    source, limit = open_source(args.model), _limit(args)
    target = target_of(args, source)
    if target.gpu is not None:  # its memory is held against whole plans, here
        target = dataclasses.replace(target, gpu=dataclasses.replace(target.gpu, memory_bytes=0))
    budgets = [Budget(bits=args.bits)] if args.bits is not None else []
    budgets += [Budget(int(_SHARE * limit))] if limit else []
    path = Path(args.out or "mine.yaml")
    try:
        found, text, plan = preset_for(
            source, target, budgets, Path(path.name), has_floats=(args.bits or 0) > 8
        )
    except PlanError as error:
        raise _too_large(error, args) from None
    crowded = _why_not_started(args, plan)
    text = text.replace("version: 1\n", "".join(f"# {x}\n" for x in crowded) + "version: 1\n", 1)
    text = f"{MODELINE}{os.path.abspath(schema_path(PRESET_SCHEMA))}\n{text}"
    if args.out:
        write_new(path, text)
        if not args.json:
            page = Page(out)
            how = "a rule of thumb" if found.kind == "guesses" else "scores of mixedprec search"
            page.print(f"{args.out}: chosen by {how}")
            page.print(totals_line(plan))
            for line in crowded:
                page.print(line)
    elif not args.json:
        print(text, end="", file=out)
    if args.json:
        print_json({"preset": plan.preset.resolved, "totals": totals(plan)}, out)
    return 0


def _too_large(error: PlanError, args: argparse.Namespace) -> PlanError:
    """Say of init's own options what a search says of its budget."""
    (problem,) = error.problems
    what, where = problem.what, problem.where
    if where == "--budget":
        where = "--fit" if args.fit else "--gpu"
        what = f"{what}; {_SHARE:.0%} of a card are counted for weights"
    remedy = "allow more, or share it among more ranks: --tp"
    return PlanError(dataclasses.replace(problem, where=where, what=what, remedy=remedy))


def _limit(args: argparse.Namespace) -> int:
    """Bytes of the card of each rank; 0 where none is named."""
    gpu = gpu_of(args)
    return parse_size(args.fit, "--fit") if args.fit else gpu.memory_bytes if gpu else 0


def _why_not_started(args: argparse.Namespace, plan: Plan) -> list[str]:
    """What SGLang's own reserve on the card leaves no room for, and what to do."""
    if args.device != "cuda":
        return []
    gpu = dataclasses.replace(gpu_of(args) or Gpu("a card", 0), memory_bytes=_limit(args))
    target = dataclasses.replace(plan.target, gpu=gpu)
    problems = why_not_in_memory(plan.layers, target, plan.source.config)
    return [f"{problem.what}: {problem.remedy}" for problem in problems]
