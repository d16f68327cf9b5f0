"""`mixedprec init`: a preset to start from, for one model and one size."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from mixedprec_plugin.checkpoint.source import Source, open_source
from mixedprec_plugin.cli.arguments import bits
from mixedprec_plugin.cli.output import print_json, write_new
from mixedprec_plugin.cli.planning import add_model_argument, add_target_arguments, target_of
from mixedprec_plugin.cli.presets import with_modeline
from mixedprec_plugin.convert.parts import parse_size
from mixedprec_plugin.errors import PlanError
from mixedprec_plugin.methods.cards import Gpu
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.methods.registry import AUTO, USUAL_4_BITS, USUAL_8_BITS
from mixedprec_plugin.plan.memory import why_not_in_memory
from mixedprec_plugin.plan.model import Plan
from mixedprec_plugin.plan.render import totals, totals_line
from mixedprec_plugin.plan.tables import Page
from mixedprec_plugin.search.candidates import AS_STORED, Unit, find_choices
from mixedprec_plugin.search.finder import GUESSES, Budget, Found, Search, Way
from mixedprec_plugin.search.kept import Basis, KeptScores
from mixedprec_plugin.search.report import header_lines
from mixedprec_plugin.search.rule import guessed
from mixedprec_plugin.search.write import Chosen, preset_text, publish

EXAMPLES = """
  mixedprec init --model DIR --fit 24GB --out mine.yaml
  mixedprec init --model Qwen/Qwen3-30B-A3B --bits 4.5 --gpu 4090
"""
# of a card, for weights; the rest is for activations, CUDA graphs and the KV cache
_SHARE = 0.75
# a share of a guess that is worth a scheme less
_TOLERANCE = 0.05
# bits a weight of more than any quantized format
_FLOATS = 9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--fit", metavar="SIZE", help="memory of the card of each rank, as 24GB")
    size.add_argument(
        "--bits", type=bits, metavar="N", help="bits a weight of linear layers, as 4.5"
    )
    add_target_arguments(parser)
    parser.add_argument("--out", metavar="FILE", help="where to write it; else it is printed")


def run(args: argparse.Namespace, out: TextIO) -> int:
    """Write a commented preset that fits the model."""
    source = open_source(args.model)
    target = target_of(args, source)
    gpu = target.gpu or Gpu("a card", 0)
    if args.fit:
        gpu = dataclasses.replace(gpu, memory_bytes=parse_size(args.fit, "--fit"))
    if target.gpu is not None:  # its memory is held against whole plans, here
        target = dataclasses.replace(target, gpu=dataclasses.replace(gpu, memory_bytes=0))
    budgets = [Budget(bits=args.bits)] if args.bits is not None else []
    budgets += [Budget(int(_SHARE * gpu.memory_bytes), share=_SHARE)] if gpu.memory_bytes else []
    path = Path(args.out or "mine.yaml")
    try:
        found, text, plan = _preset_for(
            source, target, budgets, Path(path.name), has_floats=(args.bits or 0) > 8
        )
    except PlanError as error:
        raise _too_large(error, args) from None
    crowded = _why_not_started(plan, gpu) if args.device == "cuda" else []
    text = text.replace("version: 1\n", "".join(f"# {x}\n" for x in crowded) + "version: 1\n", 1)
    text = with_modeline(text)
    if args.out:
        write_new(path, text)
    if args.json:
        print_json({"preset": plan.preset.resolved, "totals": totals(plan)}, out)
    elif args.out:
        how = "a rule of thumb" if found.way is GUESSES else "scores of mixedprec search"
        page = Page(out)
        for line in (f"{args.out}: chosen by {how}", totals_line(plan), *crowded):
            page.print(line)
    else:
        print(text, end="", file=out)
    return 0


def _too_large(error: PlanError, args: argparse.Namespace) -> PlanError:
    """Say of init's own options what a search says of its budget."""
    problem = error.problems[0]
    if problem.rule != "budget":
        return error
    what, where, remedy = problem.what, problem.where, "allow more"
    if where == "--budget":
        where = "--fit" if args.fit else "--gpu"
        what = f"{what}; {_SHARE:.0%} of a card is kept for weights"
        remedy = "allow more, or share it among more ranks: --tp"
    return PlanError(dataclasses.replace(problem, where=where, what=what, remedy=remedy))


def _why_not_started(plan: Plan, gpu: Gpu) -> list[str]:
    """What SGLang's own reserve on the card leaves no room for, and what to do."""
    target = dataclasses.replace(plan.target, gpu=gpu)
    problems = why_not_in_memory(plan.layers, target, plan.source.config)
    return [f"{problem.what}: {problem.remedy}" for problem in problems]


def _preset_for(
    model: Source, target: Target, budgets: Sequence[Budget], path: Path, *, has_floats: bool
) -> tuple[Found, str, Plan]:
    """The best preset within all of some budgets, of what needs no conversion; its text and plan.

    It is chosen by scores that `mixedprec search` kept, or else by a rule of thumb.

    Args:
        budgets: none for the finest there is.
        path: what it is to be called.
        has_floats: whether layers that are stored in floats may stay so.
    """
    choices = find_choices(model, target)
    kept = KeptScores(choices, Basis())
    found = None
    if budgets and kept.path is not None:
        search, scores = Search(choices, at_load=True), kept.read()
        with contextlib.suppress(PlanError):  # of what was scored nothing is so small
            found = _smallest([search.run(budget, scores, Way("nats")) for budget in budgets])
    if found is None:
        units = {name: _usual(unit, has_floats) for name, unit in choices.units.items()}
        choices = dataclasses.replace(choices, units=units)
        search, scores = Search(choices, True, True, _TOLERANCE), guessed(choices)
        asked = budgets or [Budget(bits=2 * _FLOATS)]
        found = _smallest([search.run(budget, scores, GUESSES) for budget in asked])
    about = header_lines(found, path, model.shown, "init")
    text = preset_text(found.choices, Chosen(found.choice, found.losses, about))
    with tempfile.TemporaryDirectory() as folder:
        plan = publish(text, found.choices, found.choice, Path(folder) / path.name)
    return found, text, plan


def _smallest(found: Sequence[Found]) -> Found:
    return min(found, key=lambda one: one.point.rank_bytes)


def _usual(unit: Unit, has_floats: bool) -> Unit:
    """A unit with the methods to start from."""
    methods = {name: option.candidate.scheme.method for name, option in unit.options.items()}
    # none with integer activations: the rule of thumb cannot judge those
    eight = next((method for method in USUAL_8_BITS if method in methods.values()), None)
    usual = (eight, USUAL_4_BITS, AUTO) if eight else methods.values()
    options = {name: unit.options[name] for name, method in methods.items() if method in usual}
    if not has_floats and 8 * options[AS_STORED].num_bytes > _FLOATS * unit.num_weights:
        del options[AS_STORED]
    return dataclasses.replace(unit, options=options)
