"""`mixedprec init`: a preset to start from, for one model and one size."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import TextIO

from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.cli.output import print_json, write_new
from mixedprec_plugin.cli.planning import add_model_argument, add_target_arguments, target_of
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
    add_model_argument(parser)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--fit", metavar="SIZE", help="memory of the card of each rank, as 24GB")
    size.add_argument(
        "--bits", type=float, metavar="N", help="bits a weight of linear layers, as 4.5"
    )
    add_target_arguments(parser)
    parser.add_argument("--out", metavar="FILE", help="where to write it; else it is printed")


def run(args: argparse.Namespace, out: TextIO) -> int:
    """Write a commented preset that fits the model."""
    # needs numpy and scipy
    from mixedprec_plugin.cli.initial import preset_for
    from mixedprec_plugin.search.finder import Budget

    source = open_source(args.model)
    target = target_of(args, source)
    gpu = target.gpu or Gpu("a card", 0)
    if args.fit:
        gpu = dataclasses.replace(gpu, memory_bytes=parse_size(args.fit, "--fit"))
    if target.gpu is not None:  # its memory is held against whole plans, here
        target = dataclasses.replace(target, gpu=dataclasses.replace(gpu, memory_bytes=0))
    budgets = [Budget(bits=args.bits)] if args.bits is not None else []
    budgets += [Budget(int(_SHARE * gpu.memory_bytes))] if gpu.memory_bytes else []
    path = Path(args.out or "mine.yaml")
    try:
        found, text, plan = preset_for(
            source, target, budgets, Path(path.name), has_floats=(args.bits or 0) > 8
        )
    except PlanError as error:
        raise _too_large(error, args) from None
    crowded = _why_not_started(plan, gpu) if args.device == "cuda" else []
    text = text.replace("version: 1\n", "".join(f"# {x}\n" for x in crowded) + "version: 1\n", 1)
    text = f"{MODELINE}{os.path.abspath(schema_path(PRESET_SCHEMA))}\n{text}"
    if args.out:
        write_new(path, text)
    if args.json:
        print_json({"preset": plan.preset.resolved, "totals": totals(plan)}, out)
    elif args.out:
        how = "a rule of thumb" if found.kind == "guesses" else "scores of mixedprec search"
        page = Page(out)
        for line in (f"{args.out}: chosen by {how}", totals_line(plan), *crowded):
            page.print(line)
    else:
        print(text, end="", file=out)
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


def _why_not_started(plan: Plan, gpu: Gpu) -> list[str]:
    """What SGLang's own reserve on the card leaves no room for, and what to do."""
    target = dataclasses.replace(plan.target, gpu=gpu)
    problems = why_not_in_memory(plan.layers, target, plan.source.config)
    return [f"{problem.what}: {problem.remedy}" for problem in problems]
