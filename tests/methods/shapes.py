"""Layer shapes that the shape rules are tried on: real ones and odd ones."""

from __future__ import annotations

import itertools
from typing import Any

from mixedprec_plugin.methods.cards import Gpu, find_gpu
from mixedprec_plugin.methods.interface import Device, LayerShape, Target
from mixedprec_plugin.methods.registry import bind
from mixedprec_plugin.methods.remedies import find_faults

SIZES = (64, 96, 192, 256, 384, 576, 768, 1000, 1024, 1536)
SCHEMES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("unquantized", {}),
    ("fp8", {}),
    ("fp8_block", {}),
    ("fp8_channel", {}),
    ("int8", {}),
    ("int8", {"weight_block_size": [64, 64]}),
    ("int8_channel", {}),
    *(("awq", {"group_size": size}) for size in (32, 64, 128, -1)),
    *(("gptq", {"group_size": size}) for size in (32, 64, 128, -1)),
    *(("gptq_int8", {"group_size": size}) for size in (32, 64, 128, -1)),
    *(("humming_int3", {"group_size": size}) for size in (32, 64, 128)),
    ("humming_int6", {}),
    ("nvfp4", {}),
    ("mxfp4", {}),
)


def check(
    name: str,
    given: dict[str, Any],
    shape: LayerShape,
    device: Device = "cuda",
    capability: int = 0,
) -> list[tuple[str, str]]:
    """Why a layer is not served, with remedies; on a GPU, what only that GPU lacks."""
    gpu = Gpu("a GPU", capability) if capability else None
    found = find_faults(*bind(name, given), shape, Target(device, gpu=gpu))
    return [(f.text, f.remedy) for f in found if f.rule == "gpu" or not capability]


def texts(
    name: str, shape: LayerShape, gpu: str = "", device: Device = "cuda", **given: Any
) -> list[str]:
    """The same on a GPU by its name, with whatever any GPU lacks."""
    target = Target(device, gpu=find_gpu(gpu) if gpu else None)
    faults = find_faults(*bind(name, given), shape, target)
    return [f"{fault.text}; {fault.remedy}" for fault in faults]


def linear(N: int, K: int, **changes: Any) -> LayerShape:
    """A layer of its own whose outputs ranks divide, but for the changes."""
    return LayerShape(**{"N": N, "K": K, "shard_sizes": (N,), "parallel": "column", **changes})


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
