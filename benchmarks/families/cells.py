"""One cell of the table: a family in a method, planned, served on one rank and two, compared."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.families import engine
from benchmarks.families.architectures import Architecture
from benchmarks.families.checkpoints import make_checkpoint, prompt
from benchmarks.families.comparison import Distance, Held, distance
from benchmarks.families.methods import kept_patterns, preset_text
from benchmarks.families.processes import ChildError, forked
from benchmarks.families.reference import Run, run_reference
from benchmarks.families.trace import Trace, join
from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.compose.stream import VirtualCheckpoint
from mixedprec_plugin.evaluate.server import free_port
from mixedprec_plugin.methods.interface import Device, Target
from mixedprec_plugin.plan.model import Plan
from mixedprec_plugin.plan.resolve import resolve_plan
from mixedprec_plugin.preset.load import load_preset

NUM_STEPS = 8
TP_SIZES = (1, 2)


@dataclasses.dataclass(frozen=True)
class Cell:
    """What came of it.

    Attributes:
        refusals: tensor-parallel size -> why the plan refuses the method for all layers.
        kept: pattern of the layers that it was served without the method, where that helps.
        held: tensor-parallel size -> how far its layers are from the reference's.
        failures: what failed, in words; empty if nothing did.
        alone: how far it is, on one rank, from the reference that gets nothing but the prompt and
            the tokens after it; None where it was not served.
        routed: as `alone`, from the reference that sends tokens to the experts that the engine
            chose, where they are nearly equal.
        effect: how far the reference is from the one in bf16, as `Distance.error`.
        cuda_refusals: as `refusals`, for a GPU.
    """

    architecture: str
    column: str
    refusals: dict[int, tuple[str, ...]]
    kept: str
    held: dict[int, Held]
    failures: tuple[str, ...]
    seconds: float
    alone: Distance | None = None
    routed: Distance | None = None
    effect: float = 0.0
    cuda_refusals: dict[int, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    @property
    def is_green(self) -> bool:
        """Whether it is served as it should be, or refused with a reason."""
        return all(held.is_within for held in self.held.values()) and not self.failures


class Runner:
    """Runs cells in forked children.

    Args:
        folder: for checkpoints and presets.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, architecture: Architecture, column: str) -> Cell:
        """Run a cell; what fails is in it."""
        start = time.perf_counter()
        (path,) = forked(
            [functools.partial(make_checkpoint, architecture, self.folder)], self.folder
        )
        whole = self._preset(architecture, column, whole=True)
        preset = self._preset(architecture, column)
        refusals: dict[int, tuple[str, ...]] = {}
        open_sizes = []
        for tp_size in TP_SIZES:
            refused = plan_errors(path, whole, tp_size)
            if refused:
                refusals[tp_size] = refused
            if not plan_errors(path, preset, tp_size):
                open_sizes.append(tp_size)
        is_kept = bool(refusals) and preset.read_text() != whole.read_text() and bool(open_sizes)
        on_cuda = {size: plan_errors(path, whole, size, "cuda") for size in TP_SIZES}
        on_cuda = {size: why for size, why in on_cuda.items() if why}
        made = Cell(architecture.name, column, refusals, "", {}, (), 0, cuda_refusals=on_cuda)
        if is_kept:
            made = dataclasses.replace(made, kept=", ".join(kept_patterns(architecture, column)))
        if 1 in open_sizes:
            made = self._compared(made, architecture, path, preset, open_sizes)
        return dataclasses.replace(made, seconds=time.perf_counter() - start)

    def _compared(
        self, cell: Cell, architecture: Architecture, path: Path, preset: Path, sizes: list[int]
    ) -> Cell:
        try:
            (one,) = forked(self._ranks(path, preset, 1, []), self.folder)
            forced = one["tokens"][:-1]
            refer = functools.partial(_refer, architecture, path, forced=forced)
            works: list[Callable[[], Any]] = [
                functools.partial(refer, preset, one["trace"], takes_inputs=True),
                functools.partial(refer, preset, one["trace"]),
                functools.partial(refer, preset),
                functools.partial(refer, self._preset(architecture, "bf16")),
            ]
            followed, routed, alone, plain = forked(works, self.folder)
            held = {1: Held(_distance(one, followed), followed.steps)}
            if 2 in sizes:
                ranks = forked(self._ranks(path, preset, 2, forced), self.folder)
                trace = join([rank["trace"] for rank in ranks], _plan(path, preset, 2))
                work = functools.partial(refer, preset, trace, takes_inputs=True, num_ranks=2)
                (followed,) = forked([work], self.folder)
                held[2] = Held(_distance(ranks[0], followed), followed.steps)
        except ChildError as error:
            return dataclasses.replace(cell, failures=(str(error),))
        return dataclasses.replace(
            cell,
            held=held,
            alone=_distance(one, alone),
            routed=_distance(one, routed),
            effect=distance(alone.logits, plain.logits, 1).error,
        )

    def _ranks(
        self, path: Path, preset: Path, tp_size: int, forced: list[int]
    ) -> list[Callable[[], Any]]:
        port = free_port()
        return [
            functools.partial(_serve_rank, path, preset, tp_size, port, rank, forced)
            for rank in range(tp_size)
        ]

    def _preset(self, architecture: Architecture, column: str, *, whole: bool = False) -> Path:
        name = f"{architecture.config_class}-{column}{'-whole' if whole else ''}.yaml"
        path = self.folder / name
        path.write_text(preset_text(architecture, column, whole=whole), encoding="utf-8")
        return path


def plan_errors(path: Path, preset: Path, tp_size: int, device: Device = "cpu") -> tuple[str, ...]:
    """What the plan of a cell has against it; empty if nothing."""
    return tuple(str(problem) for problem in _plan(path, preset, tp_size, device).errors)


def _distance(served: dict[str, Any], reference: Run) -> Distance:
    return distance(served["logits"], reference.logits, NUM_STEPS + 1)


def _refer(
    architecture: Architecture,
    path: Path,
    preset: Path,
    trace: Trace | None = None,
    *,
    forced: list[int],
    takes_inputs: bool = False,
    num_ranks: int = 1,
) -> Run:
    """Run the reference over the prompt and the tokens after it."""
    stream = VirtualCheckpoint(_plan(path, preset, 1))
    tokens = (prompt(), forced)
    return run_reference(
        architecture,
        path,
        stream,
        tokens,
        trace,
        takes_inputs=takes_inputs,
        num_ranks=num_ranks,
    )


def _plan(path: Path, preset: Path, tp_size: int, device: Device = "cpu") -> Plan:
    target = Target(device=device, tp_size=tp_size)
    return resolve_plan(load_preset(preset), open_source(path), target)


def _serve_rank(
    path: Path, preset: Path, tp_size: int, port: int, rank: int, forced: list[int]
) -> dict[str, Any]:
    args = engine.server_args(path, preset, tp_size)
    return engine.serve(args, port, rank, prompt(), NUM_STEPS, forced)
