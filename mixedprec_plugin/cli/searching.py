"""The work of `mixedprec search`, step by step."""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from mixedprec_plugin.checkpoint.source import Source, open_source
from mixedprec_plugin.cli.output import print_json, progress_for
from mixedprec_plugin.cli.planning import load_of, target_of
from mixedprec_plugin.errors import PlanError, Problem, UsageError
from mixedprec_plugin.plan.budget import Budget as CardBudget
from mixedprec_plugin.plan.budget import gpu_budget, nearest_that_fits
from mixedprec_plugin.plan.model import Plan
from mixedprec_plugin.plan.resolve import resolve_plan
from mixedprec_plugin.plan.sources import open_other_sources
from mixedprec_plugin.plan.tables import Page
from mixedprec_plugin.preset.load import load_preset, preset_for
from mixedprec_plugin.preset.model import SourceReference
from mixedprec_plugin.search.candidates import Choices, canonical_methods, find_choices
from mixedprec_plugin.search.finder import AnotherWay, Budget, Kind, Search, find_scores
from mixedprec_plugin.search.kept import Basis, KeptScores, Scores
from mixedprec_plugin.search.report import Measured, as_dict, header_lines, print_found
from mixedprec_plugin.search.rule import guessed
from mixedprec_plugin.search.write import Chosen, preset_text, publish

if TYPE_CHECKING:
    from rich.progress import Progress

_BASIS = Basis()
_PART_BYTES = 5 * 10**9
_GIVEN = ("text", "windows", "length", "seed", "held_out")


def search(args: argparse.Namespace, out: TextIO) -> None:
    """Find, write, convert, measure and draw, as the command line says."""
    begun = time.monotonic()
    model = open_source(args.model)
    references, sources = _sources(args.sources)
    others = {name: (references[name], source) for name, source in sources.items()}
    methods = canonical_methods(filter(None, args.methods.split(",")))
    choices = find_choices(model, target_of(args, model), methods, others)
    budget, card = _budget(args, choices)
    with progress_for(args) as bar:
        scores, made, about = _scores(args, choices, sources, bar)
        own = Search(choices, args.at_load, args.experts == "layer")
        try:
            found = dataclasses.replace(own.run(budget, scores, about.kind, made), **about.more)
        except PlanError as error:
            raise _with_nearest(args, error, choices, own.smallest(scores), card) from None
        lines = header_lines(found, args.out, args.model)
        text = preset_text(found.choices, Chosen(found.choice, found.losses, lines), references)
        plan = publish(text, found.choices, found.choice, sources, args.out)
        seconds = time.monotonic() - begun
        measured = _converted(args, plan, bar)
    if args.plot:
        from mixedprec_plugin.search.picture import draw

        draw(found, args.plot)
    if args.json:
        print_json(as_dict(found, card, measured, seconds), out)
    else:
        print_found(found, card, measured, seconds, args.out, Page(out))


def _sources(path: Path | None) -> tuple[Mapping[str, SourceReference], Mapping[str, Source]]:
    if path is None:
        return {}, {}
    preset = load_preset(path)
    if not preset.sources:
        raise UsageError(Problem("--sources", f"{path} has no sources (expected one or more)"))
    return preset.sources, open_other_sources(preset, everything=True)


def _budget(args: argparse.Namespace, choices: Choices) -> tuple[Budget, CardBudget | None]:
    load, target = load_of(args), choices.base.target
    if load is None or target.gpu is None:
        return Budget(args.budget, args.bits or 0.0), None
    card = gpu_budget(target.gpu, target.tp_size, choices.base.source.config, load)
    return Budget(card.weights), card


def _scores(
    args: argparse.Namespace, choices: Choices, sources: Mapping[str, Source], bar: Progress
) -> tuple[Scores, int, _About]:
    """The scores, how many were made, and what they are."""
    if args.fast:
        return guessed(choices), 0, _About("guesses", {})
    basis, base = _basis(args), choices.base
    if basis.in_engine:
        return _measured(args, choices, sources, basis, bar)
    if basis.inputs is None:
        kept = KeptScores(base.source, base.target.dtype, basis, sources)
        about = _About("nats" if basis.gradients else "shares", {})
        return *find_scores(choices, kept, basis, bar, at_load=args.at_load), about
    # only this needs torch
    from mixedprec_plugin.calibrate.gathered import Gathered
    from mixedprec_plugin.search.gathered import score_gathered, unscored

    gathered = Gathered(basis.inputs, base)
    another = AnotherWay(
        lambda wanted, bar: score_gathered(choices, wanted, gathered, bar),
        unscored(choices, gathered),
    )
    kept = KeptScores(base.source, base.target.dtype, basis, sources, gathered.facts)
    made = find_scores(choices, kept, basis, bar, at_load=args.at_load, another=another)
    what = f"{gathered.num_tokens:,} tokens that an engine gathered in {basis.inputs}"
    more = {"scored_on": what, "unscored": another.without}
    return *made, _About("parts" if gathered.shares else "shares", more)


def _measured(
    args: argparse.Namespace, choices: Choices, sources: Mapping[str, Source], basis: Basis,
    bar: Progress,
) -> tuple[Scores, int, _About]:  # fmt: skip
    """KL of single units in an engine of the unquantized model, which is started for it."""
    from mixedprec_plugin.search.measured import can_measure, measure_scores, unmeasured

    with tempfile.TemporaryDirectory(prefix="mixedprec-search-") as name:
        another = AnotherWay(
            lambda wanted, bar: measure_scores(choices, wanted, basis, Path(name), bar),
            unmeasured(choices),
            can_measure,
        )
        kept = KeptScores(choices.base.source, choices.base.target.dtype, basis, sources)
        made = find_scores(choices, kept, basis, bar, at_load=args.at_load, another=another)
    return *made, _About("measured", {"unscored": another.without})


class _About(NamedTuple):
    """What scores are, and what else `Found` says of them."""

    kind: Kind
    more: dict[str, Any]


def _basis(args: argparse.Namespace) -> Basis:
    given = {name: value for name in _GIVEN if (value := getattr(args, name)) is not None}
    gradients = not (args.no_gradients or args.inputs or args.in_engine)
    return Basis(**given, gradients=gradients, inputs=args.inputs, in_engine=args.in_engine)


def _with_nearest(
    args: argparse.Namespace,
    error: PlanError,
    choices: Choices,
    smallest: int,
    card: CardBudget | None,
) -> PlanError:
    """Say of a card's budget what would fit."""
    load, target = load_of(args), choices.base.target
    if card is None or load is None or target.gpu is None:
        return error
    remedy = nearest_that_fits(
        target.gpu, target.tp_size, choices.base.source.config, load,
        lambda size: smallest * target.tp_size // size,
    )  # fmt: skip
    what = (
        f"{target.gpu.name} has {max(card.weights, 0) / 1e9:.1f} GB left for weights on a rank "
        f"(expected {smallest / 1e9:.1f} GB or more)"
    )
    lines = (f"{line.title} {line.num_bytes / 1e9:.1f} GB ({line.formula})" for line in card.lines)
    return PlanError(Problem("--gpu", f"{what}: {', '.join(lines)}", remedy, "budget"))


def _converted(args: argparse.Namespace, plan: Plan, bar: Progress) -> Measured | None:
    """Convert and measure, where that is asked for; a check alone leaves nothing behind."""
    if not args.convert and not args.check:
        return None
    with tempfile.TemporaryDirectory(prefix="mixedprec-search-") as name:
        folder = Path(name)
        served = plan
        if args.convert or plan.not_calibrated():
            served = _convert(args, plan, args.convert or folder / "converted", bar)
        return _measure(args, served, plan.source, folder, bar) if args.check else None


def _convert(args: argparse.Namespace, plan: Plan, out: Path, bar: Progress) -> Plan:
    """Write the model so, and plan what was written."""
    from mixedprec_plugin.calibrate.calibrator import Calibration, Options
    from mixedprec_plugin.convert.converter import convert
    from mixedprec_plugin.convert.form import MixedForm

    calibration = None
    if plan.not_calibrated():
        text = {name: getattr(args, name) for name in ("text", "length", "seed")}
        given = {name: value for name, value in text.items() if value is not None}
        options = Options(**given, gradients=not args.no_gradients)
        calibration = Calibration(plan, options, bar, everything=False)
    task = bar.add_task("converting", total=None)
    convert(
        plan, MixedForm(), out, _PART_BYTES, calibration=calibration,
        progress=lambda done, total: bar.update(task, completed=done, total=total),
    )  # fmt: skip
    bar.remove_task(task)
    converted = open_source(out)
    return resolve_plan(preset_for("", converted, [], "--convert"), converted, plan.target).check()


def _measure(
    args: argparse.Namespace, plan: Plan, reference: Source, folder: Path, bar: Progress
) -> Measured:
    """Its divergence on text of another seed, or on all of the user's."""
    from mixedprec_plugin.evaluate.report import evaluate

    work = folder / "eval"
    work.mkdir()
    windows, length = 2 * (args.held_out or _BASIS.held_out), args.length or _BASIS.length
    seed = (args.seed or 0) + 1
    rows = evaluate({"found": plan}, reference, args.text, windows, length, seed, work, bar)
    kl = rows[1].found.kl
    what = f"{args.text}" if args.text else "text that the model wrote anew"
    return Measured(kl.value, kl.error, f"{what}, {windows} windows of {length} tokens")
