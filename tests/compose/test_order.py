from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

from mixedprec_plugin.checkpoint.headers import StoredTensor
from mixedprec_plugin.compose.stream import in_reading_order
from mixedprec_plugin.plan.model import PlannedLayer

MIB = 1 << 20


def _layer(file: str, start: int, num_bytes: int) -> PlannedLayer:
    tensor = StoredTensor(f"{file}{start}", "U8", (num_bytes,), Path(file), start, num_bytes)
    return cast(PlannedLayer, SimpleNamespace(name=tensor.name, inputs={"weight": tensor}))


def _places(layers: list[PlannedLayer]) -> list[tuple[str, int]]:
    tensors = [layer.inputs["weight"] for layer in layers]
    return [(str(tensor.path), tensor.start) for tensor in tensors]


def test_files_are_read_one_after_another_each_of_them_forward() -> None:
    layers = [_layer(file, i * MIB, MIB) for file in "ba" for i in (2, 0, 1)]
    assert _places(in_reading_order(layers)) == [
        ("a", 0), ("a", MIB), ("a", 2 * MIB), ("b", 0), ("b", MIB), ("b", 2 * MIB),
    ]  # fmt: skip


def test_what_is_large_comes_first_while_the_model_is_empty() -> None:
    layers = [_layer("a", 0, 9), _layer("a", 9, 100 * MIB), _layer("b", 0, 200 * MIB)]
    assert _places(in_reading_order(layers)) == [("b", 0), ("a", 9), ("a", 0)]
