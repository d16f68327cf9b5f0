"""The order in which the layers of a plan are read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from mixedprec_plugin.plan.model import Plan, PlannedLayer

# above, a layer is read while the model's memory is still empty: it is there twice
_LARGE_BYTES = 64 << 20
_NUM_FILES = 4
# small layers of one file that are read together, before it is another file's turn
_RUN_BYTES = 1 << 20


def in_file_order(plan: Plan) -> list[PlannedLayer]:
    """The layers of a plan one file after another, as they lie there."""
    return sorted(plan.layers, key=_place)


def in_reading_order(layers: Iterable[PlannedLayer]) -> list[PlannedLayer]:
    """Order layers so that each file is read forward and several files at once.

    The largest come first, of any file: while one is placed, its bytes are in memory twice, which
    at the end would be on top of the whole model.
    """
    ordered = sorted(layers, key=_place)
    large = [layer for layer in ordered if _num_bytes(layer) > _LARGE_BYTES]
    files: dict[Path, list[PlannedLayer]] = {}
    for layer in ordered:
        if _num_bytes(layer) <= _LARGE_BYTES:
            files.setdefault(_first_path(layer), []).append(layer)
    queues = list(files.values())
    merged = [
        layer
        for start in range(0, len(queues), _NUM_FILES)
        for layer in _merge(queues[start : start + _NUM_FILES])
    ]
    return sorted(large, key=_num_bytes, reverse=True) + merged


def _merge(queues: Sequence[Sequence[PlannedLayer]]) -> list[PlannedLayer]:
    """Merge lists so that all of them end together."""
    placed: list[tuple[float, int, PlannedLayer]] = []
    for number, queue in enumerate(queues):
        total, done = sum(map(_num_bytes, queue)), 0
        for layer in queue:
            start = done - done % _RUN_BYTES
            placed.append((start / total if total else 0.0, number, layer))
            done += _num_bytes(layer)
    return [layer for _, _, layer in sorted(placed, key=lambda item: item[:2])]


def _num_bytes(layer: PlannedLayer) -> int:
    return sum(tensor.num_bytes for tensor in layer.inputs.values())


def _first_path(layer: PlannedLayer) -> Path:
    return min(tensor.path for tensor in layer.inputs.values())


def _place(layer: PlannedLayer) -> tuple[str, int]:
    first = min(layer.inputs.values(), key=lambda tensor: (str(tensor.path), tensor.start))
    return str(first.path), first.start
