"""`mixedprec convert`: write what a preset makes of a checkpoint to disk."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from mixedprec_plugin.calibrate import LENGTH, WINDOWS
from mixedprec_plugin.cli.output import print_json, progress_for
from mixedprec_plugin.cli.planning import (
    add_planning_arguments,
    add_text_arguments,
    given,
    make_plan,
)
from mixedprec_plugin.convert.parts import SHARD_SIZE, parse_size
from mixedprec_plugin.errors import PlanError, Problem, UsageError, printable
from mixedprec_plugin.plan.drafts import as_stored, own_draft, resolve_draft_plan, with_draft
from mixedprec_plugin.plan.model import Plan
from mixedprec_plugin.plan.render import format_bytes

if TYPE_CHECKING:
    from rich.progress import Progress

    from mixedprec_plugin.calibrate.calibrator import Calibration
    from mixedprec_plugin.convert.converter import Converted

EXAMPLES = """
  mixedprec convert --model DIR --preset awq --out DIR-awq
  mixedprec convert --model DIR --preset awq --calibrate --out DIR-awq
  mixedprec convert --model DIR --preset fp8-block --format compressed-tensors --out OUT
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_planning_arguments(parser)
    parser.add_argument(
        "--out", required=True, metavar="DIR",
        help="new folder; if an earlier run of the same command was stopped, it is continued",
    )  # fmt: skip
    parser.add_argument(
        "--max-shard-size", default=SHARD_SIZE, metavar="SIZE",
        help=f"most bytes of a file ({SHARD_SIZE})",
    )  # fmt: skip
    parser.add_argument(
        "--format", choices=("mixedprec", "compressed-tensors"), default="mixedprec",
        help="compressed-tensors: for stock SGLang and vLLM, where the plan can be written so",
    )  # fmt: skip
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what another conversion wrote to DIR"
    )

    calibrated = parser.add_argument_group("calibration", "round so that predictions change least")
    calibrated.add_argument(
        "--calibrate", action="store_true",
        help="all quantized layers in 4- or 8-bit integers or FP8; without it, those whose scheme "
        "says so",
    )  # fmt: skip
    calibrated.add_argument(
        "--no-gradients", action="store_true",
        help="weigh all tokens alike: half the time, for models that cannot be differentiated",
    )  # fmt: skip
    calibrated.add_argument(
        "--fold", action="store_true",
        help="scale the columns of layers, and norms, v_proj and up_proj the other way, where that "
        "loses less; it takes about half as long again",
    )  # fmt: skip
    add_text_arguments(calibrated, "calibrate on", "the model", WINDOWS, LENGTH)


def run(args: argparse.Namespace, out: TextIO) -> int:
    """Write the checkpoint; progress goes to standard error where that is a terminal."""
    plan = make_plan(args).check()
    written = _written(args, plan).check()
    # the verbs that only read run without torch
    from mixedprec_plugin.convert.compressed import CompressedForm
    from mixedprec_plugin.convert.converter import convert
    from mixedprec_plugin.convert.form import Form, MixedForm

    size = parse_size(args.max_shard_size)
    form: Form = CompressedForm() if args.format == "compressed-tensors" else MixedForm()
    with plan.preset.concealing(), progress_for(args) as bar:
        calibration = _calibration(args, plan, bar)
        if calibration and calibration.is_helper:
            calibration.help()
            return 0
        task = bar.add_task("converting", total=None)
        try:
            done = convert(
                written, form, Path(args.out), size, overwrite=args.overwrite,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
                calibration=calibration,
            )  # fmt: skip
        finally:
            if calibration:
                calibration.dismiss()
    _print(args, done, calibration, out)
    return 0


def _print(
    args: argparse.Namespace, done: Converted, calibration: Calibration | None, out: TextIO
) -> None:
    """Say what was written, and what a calibration predicts, folded and did not see."""
    loss = calibration.predicted_loss if calibration else None
    unseen = calibration.unseen if calibration else []
    if args.json:
        found = {**dataclasses.asdict(done), "predicted_kl": loss, "unseen": unseen}
        if args.fold and calibration:
            found |= {"folded": calibration.folded, "not_folded": calibration.folds.left}
        print_json({"folder": args.out, **found}, out)
        return
    kept = f", {done.num_kept} of them from before" if done.num_kept else ""
    files = f"{done.num_parts} file{'s' if done.num_parts > 1 else ''}"
    print(f"{printable(args.out)}: {format_bytes(done.num_bytes)} in {files}{kept}", file=out)
    if loss is not None:
        print(f"predicted KL on text that was held out: {loss:.4f} nats a token", file=out)
    if args.fold and calibration:
        num_folded, num_units = len(calibration.folded), calibration.folds.num_units
        print(f"scales folded in {num_folded} of {num_units} units of layers", file=out)
        for left in calibration.folds.left:
            print(f"not folded: {printable(left.where)}: {left.what}", file=out)
    if unseen:
        layers = "1 layer of an expert" if len(unseen) == 1 else f"{len(unseen)} layers of experts"
        print(
            f"no token of that text reached {layers}, such as {printable(unseen[0])}: gate and up "
            "are rounded by what other experts read, down as if its inputs were alike; more "
            "--windows, or a --text of yours, may reach them", file=out,
        )  # fmt: skip


def _written(args: argparse.Namespace, plan: Plan) -> Plan:
    """The plan with the model's own layers of multi-token prediction, if it has some.

    They are written as the preset's section `draft` says, or else as they are stored.
    """
    if own_draft(plan.source) is None:
        return plan
    draft = plan.preset.draft
    if args.format == "compressed-tensors":
        if draft is None:
            return plan
        what = "SGLang by itself asks for layers of multi-token prediction by other names"
        remedy = "remove the section: they are written as they are stored"
        raise PlanError(Problem(f"{draft.path}: draft", what, remedy, "compressed-tensors"))
    made = resolve_draft_plan(draft or as_stored(plan.preset), plan.source, plan.target)
    return with_draft(plan, made.servable())


def _calibration(args: argparse.Namespace, plan: Plan, bar: Progress) -> Calibration | None:
    text = given(args, "text", "windows", "length", "seed")
    if not args.calibrate and not plan.not_calibrated():
        unused = [*text, *["no-gradients"] * args.no_gradients, *["fold"] * args.fold]
        if unused:
            where = ", ".join(f"--{name}" for name in unused)
            raise UsageError(Problem(where, "is for calibration", "add --calibrate"))
        return None
    from mixedprec_plugin.calibrate.calibrator import Calibration, Options

    options = Options(**text, gradients=not args.no_gradients, fold=args.fold)
    return Calibration(plan, options, bar, everything=args.calibrate)
