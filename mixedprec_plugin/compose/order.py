"""The order in which the layers of a plan are read."""

from __future__ import annotations

from collections.abc import Iterable

from mixedprec_plugin.plan.model import Plan, PlannedLayer

# above, a layer is read while the model's memory is still empty: it is there twice
_LARGE_BYTES = 32 << 20


def in_file_order(plan: Plan) -> list[PlannedLayer]:
    """The layers of a plan one file after another, as they lie there."""
    return sorted(plan.layers, key=_place)


def in_reading_order(layers: Iterable[PlannedLayer]) -> list[PlannedLayer]:
    """Order layers so that each file is read forward, after the largest layers of any file.

    While these are placed, their bytes are in memory twice, which at the end would be on top of the
    whole model.
    """
    ordered = sorted(layers, key=_place)
    large = [layer for layer in ordered if _num_bytes(layer) > _LARGE_BYTES]
    small = [layer for layer in ordered if _num_bytes(layer) <= _LARGE_BYTES]
    return sorted(large, key=_num_bytes, reverse=True) + small


def _num_bytes(layer: PlannedLayer) -> int:
    return sum(tensor.num_bytes for tensor in layer.inputs.values())


def _place(layer: PlannedLayer) -> tuple[str, int]:
    first = min(layer.inputs.values(), key=lambda tensor: (str(tensor.path), tensor.start))
    return str(first.path), first.start
