"""One cell of the table: a family in a method, planned, served on one rank and two, compared."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.families import engine
from benchmarks.families.architectures import Architecture
from benchmarks.families.checkpoints import make_checkpoint, prompt
from benchmarks.families.comparison import Distance, distance
from benchmarks.families.methods import preset_text
from benchmarks.families.processes import ChildError, forked, free_port
from benchmarks.families.reference import run_reference
from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.compose.stream import VirtualCheckpoint
from mixedprec_plugin.plan.model import Device, Plan, Target
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
        distances: tensor-parallel size -> how far it is from the reference; on two ranks, from one.
        effect: how far the reference is from the one in bf16, as `Distance.error`.
        failures: what failed, in words; empty if nothing did.
        cuda_refusals: as `refusals`, for a GPU.
    """

    architecture: str
    column: str
    refusals: dict[int, tuple[str, ...]]
    kept: str
    distances: dict[int, Distance]
    failures: tuple[str, ...]
    seconds: float
    effect: float = 0.0
    cuda_refusals: dict[int, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    @property
    def is_green(self) -> bool:
        """Whether it is served as it should be, or refused with a reason."""
        served = all(near.is_within(self.column) for near in self.distances.values())
        return served and not self.failures


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
            made = dataclasses.replace(made, kept=kept_pattern(architecture, column))
        if 1 in open_sizes:
            made = self._compared(made, architecture, path, preset, open_sizes)
        return dataclasses.replace(made, seconds=time.perf_counter() - start)

    def _compared(
        self, cell: Cell, architecture: Architecture, path: Path, preset: Path, sizes: list[int]
    ) -> Cell:
        distances: dict[int, Distance] = {}
        failures: list[str] = []
        effect = 0.0
        try:
            (one,) = forked(self._ranks(path, preset, 1, []), self.folder)
            forced = one["tokens"][:-1]
            works: list[Callable[[], Any]] = [
                functools.partial(reference_logits, architecture, path, which, forced)
                for which in (preset, self._preset(architecture, "bf16"))
            ]
            if 2 in sizes:
                works += self._ranks(path, preset, 2, forced)
            reference, plain, *ranks = forked(works, self.folder)
            distances[1] = distance(one["logits"], reference, NUM_STEPS + 1)
            if ranks:
                distances[2] = distance(ranks[0]["logits"], one["logits"], NUM_STEPS + 1)
            effect = distance(reference, plain, 1).error
        except ChildError as error:
            failures.append(str(error))
        return dataclasses.replace(
            cell, distances=distances, failures=tuple(failures), effect=effect
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


def kept_pattern(architecture: Architecture, column: str) -> str:
    """The layers that stay bf16 under a method."""
    return architecture.unquantized.get(column, architecture.unquantized.get("*", ""))


def plan_errors(path: Path, preset: Path, tp_size: int, device: Device = "cpu") -> tuple[str, ...]:
    """What the plan of a cell has against it; empty if nothing."""
    return tuple(str(problem) for problem in _plan(path, preset, tp_size, device).errors)


def reference_logits(
    architecture: Architecture, path: Path, preset: Path, forced: list[int]
) -> torch.Tensor:
    """The reference's logits of the prompt and the tokens after it."""
    stream = VirtualCheckpoint(_plan(path, preset, 1))
    return run_reference(architecture, path, stream, prompt(), forced)


def _plan(path: Path, preset: Path, tp_size: int, device: Device = "cpu") -> Plan:
    target = Target(device=device, tp_size=tp_size)
    return resolve_plan(load_preset(preset), open_source(path), target)


def _serve_rank(
    path: Path, preset: Path, tp_size: int, port: int, rank: int, forced: list[int]
) -> dict[str, Any]:
    args = engine.server_args(path, preset, tp_size)
    return engine.serve(args, port, rank, prompt(), NUM_STEPS, forced)
