"""`mixedprec search`: the preset of the best quality for a budget of memory."""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, TypeVar

from mixedprec_plugin.checkpoint.source import Source, open_source
from mixedprec_plugin.cli.arguments import bits, positive
from mixedprec_plugin.cli.output import check_plot, print_json, progress_for, save_plot
from mixedprec_plugin.cli.planning import (
    add_load_arguments,
    add_model_argument,
    add_target_arguments,
    add_text_arguments,
    given,
    load_of,
    target_of,
)
from mixedprec_plugin.convert.parts import SHARD_SIZE, parse_size
from mixedprec_plugin.errors import PlanError, Problem, UsageError
from mixedprec_plugin.plan.budget import Budget as CardBudget
from mixedprec_plugin.plan.budget import gpu_budget, nearest_that_fits
from mixedprec_plugin.plan.model import Plan
from mixedprec_plugin.plan.resolve import resolve_plan
from mixedprec_plugin.plan.sources import open_other_sources
from mixedprec_plugin.plan.tables import Page
from mixedprec_plugin.preset.load import load_preset, preset_for
from mixedprec_plugin.search.candidates import Choices, Others, canonical_methods, find_choices
from mixedprec_plugin.search.finder import GUESSES, Budget, Search, Way, find_scores
from mixedprec_plugin.search.kept import Basis, KeptScores, Scores, Wanted
from mixedprec_plugin.search.report import Measured, as_dict, draw, header_lines, print_found
from mixedprec_plugin.search.rule import guessed
from mixedprec_plugin.search.write import Chosen, preset_text, publish

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")

EXAMPLES = """
  mixedprec search --model DIR --bits 4.5 --out mine.yaml
  mixedprec search --model DIR --gpu RTX4090 --context 32k --concurrency 16 --out mine.yaml
  mixedprec search --model DIR --budget 12GiB --tp 2 --sources all.yaml --out mine.yaml
  mixedprec search --model DIR --bits 5 --inputs FOLDER --out mine.yaml
"""

# arguments that say what scores are made on
_TEXT = ("text", "windows", "length", "seed", "held_out")
_BASIS = Basis()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    wanted = parser.add_argument_group("budget", "one of these, or --gpu with --context")
    wanted.add_argument(
        "--bits", type=bits, metavar="N", help="bits a weight of linear layers, scales counted"
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
    begun = time.monotonic()
    model = open_source(args.model)
    methods = canonical_methods(filter(None, args.methods.split(",")))
    choices = find_choices(model, target_of(args, model), methods, _others(args.sources))
    budget, card = _budget(args, choices)
    with progress_for(args) as bar:
        own = Search(choices, args.at_load, args.experts == "layer")

        def within(attempt: Callable[[], T], scores: Scores) -> T:
            try:
                return attempt()
            except PlanError as error:
                raise _with_nearest(args, error, choices, own.smallest(scores), card) from None

        if not args.inputs and not args.in_engine:  # which may leave units without scores
            # scores can take hours
            within(lambda: own.check(budget, own.unscored), own.unscored)
        scores, made, way = _scores(args, choices, bar)
        found = within(lambda: own.run(budget, scores, way, made), scores)
        lines = header_lines(found, args.out, args.model)
        text = preset_text(found.choices, Chosen(found.choice, found.losses, lines))
        plan = publish(text, found.choices, found.choice, args.out)
        seconds = time.monotonic() - begun
        measured = _converted(args, plan, bar)
    if args.plot:
        save_plot(draw(found), args.plot)
    if args.json:
        print_json(as_dict(found, card, measured, seconds), out)
    else:
        print_found(found, card, measured, seconds, args.out, Page(out))
    return 0


def _check_options(args: argparse.Namespace) -> None:
    """See that the options go together."""
    wanted = given(args, "bits", "budget", "context")
    if len(wanted) != 1:
        what = f"{' and '.join(f'--{x}' for x in wanted) or 'none of them'} (expected one)"
        remedy = "name one of --bits N, --budget SIZE, or --gpu NAME --context TOKENS"
        raise UsageError(Problem("--bits, --budget, --context", what, remedy, "budget"))
    if args.context is not None and not args.gpu:
        remedy = "add --gpu NAME, or give --budget"
        raise UsageError(Problem("--context", "is for a GPU", remedy, "budget"))
    load_of(args)
    unused = [f"--{x.replace('_', '-')}" for x in given(args, *_TEXT)]
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


def _others(path: Path | None) -> Others:
    if path is None:
        return {}
    preset = load_preset(path)
    if not preset.sources:
        raise UsageError(Problem("--sources", f"{path} has no sources (expected one or more)"))
    opened = open_other_sources(preset, everything=True)
    return {name: (preset.sources[name], source) for name, source in opened.items()}


def _budget(args: argparse.Namespace, choices: Choices) -> tuple[Budget, CardBudget | None]:
    load, target = load_of(args), choices.base.target
    if load is None or target.gpu is None:
        size = parse_size(args.budget, "--budget") if args.budget is not None else None
        return Budget(size, args.bits or 0.0), None
    card = gpu_budget(target.gpu, target.tp_size, choices.base.source.config, load)
    return Budget(card.weights), card


def _scores(args: argparse.Namespace, choices: Choices, bar: Progress) -> tuple[Scores, int, Way]:
    """The scores, how many were made, and how."""
    if args.fast:
        return guessed(choices), 0, GUESSES
    gradients = not (args.no_gradients or args.inputs or args.in_engine)
    basis = Basis(
        **given(args, *_TEXT), gradients=gradients, inputs=args.inputs, in_engine=args.in_engine
    )
    gathered = None
    # each way needs torch, but for scores that are there
    if args.inputs:
        from mixedprec_plugin.calibrate.gathered import Gathered

        gathered = Gathered(args.inputs, choices.base)
    kept = KeptScores(choices, basis, gathered.facts if gathered else None)
    if gathered:
        from mixedprec_plugin.search.gathered import way_of_gathered

        way = way_of_gathered(choices, gathered)
    elif args.in_engine:
        from mixedprec_plugin.search.measured import way_of_engine

        way = way_of_engine(choices, basis)
    else:
        way = Way("nats" if gradients else "shares", functools.partial(_swept, choices, kept))
    return *find_scores(choices, kept, way, bar, at_load=args.at_load), way


def _swept(choices: Choices, kept: KeptScores, wanted: Wanted, bar: Progress) -> Iterator[Scores]:
    from mixedprec_plugin.search.scores import sweep_for_scores

    return sweep_for_scores(choices, wanted, kept, bar)


def _with_nearest(
    args: argparse.Namespace, error: PlanError, choices: Choices, smallest: int,
    card: CardBudget | None,
) -> PlanError:  # fmt: skip
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
        text = given(args, "text", "length", "seed")
        options = Options(**text, gradients=not args.no_gradients)
        calibration = Calibration(plan, options, bar, everything=False)
    task = bar.add_task("converting", total=None)
    convert(
        plan, MixedForm(), out, parse_size(SHARD_SIZE), calibration=calibration,
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
    what = f"{args.text}" if args.text else "new text that the model wrote"
    return Measured(kl.value, kl.error, f"{what}, {windows} windows of {length} tokens")
