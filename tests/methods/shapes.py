"""Layer shapes that the shape rules are tried on: real ones and odd ones."""

from __future__ import annotations

import itertools
from typing import Any

from mixedprec_plugin.methods.spec import LayerShape

SIZES = (64, 96, 192, 256, 384, 576, 768, 1000, 1024, 1536)
SCHEMES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("unquantized", {}),
    ("fp8", {}),
    ("fp8_block", {}),
    ("fp8_channel", {}),
    ("int8", {}),
    ("int8", {"weight_block_size": [64, 64]}),
    *(("awq", {"group_size": size}) for size in (32, 64, 128, -1)),
    *(("gptq", {"group_size": size}) for size in (32, 64, 128, -1)),
    *(("gptq_int8", {"group_size": size}) for size in (32, 64, 128, -1)),
)


def grid() -> list[LayerShape]:
    """Lone and fused layers of every kind of parallelism on 1, 2 and 4 ranks."""
    shapes = []
    for N, K, tp_size in itertools.product(SIZES, SIZES, (1, 2, 4)):
        shapes.append(LayerShape(N, K, (N,), "column", tp_size))
        shapes.append(LayerShape(N, K, (N,), "row", tp_size))
        shapes.append(LayerShape(N, K, (N,), "replicated", tp_size))
        shapes.append(LayerShape(N, K, (N, N), "column", tp_size))
        shapes.append(LayerShape(N, K, (N, 192, 192), "column", tp_size))
    return shapes
