"""The modules that a model built, held against the plan before a weight is read."""

from __future__ import annotations

import torch
from sglang.srt.layers.linear import LinearBase, MergedColumnParallelLinear, QKVParallelLinear

from mixedprec_plugin.errors import LoadError, Problem
from mixedprec_plugin.plan.folding import fold_names
from mixedprec_plugin.plan.model import PlannedLayer
from mixedprec_plugin.serving.config import MixedPrecisionConfig


def check_built(config: MixedPrecisionConfig) -> None:
    """Check that the model built every planned linear layer, in the planned shape.

    Raises:
        LoadError: a layer that nothing runs, or one of another shape; all are named.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for module, layers in config.plan.modules.items():
        if all(layer.kind != "linear" for layer in layers):
            continue
        built = config.built.get(module)
        for layer in layers:
            text = _difference(layer, built)
            if text:
                found.setdefault((text, module if built is None else ""), []).append(layer.name)
    if found:
        raise LoadError(
            Problem(
                folded,
                text,
                "config.json and weights are of different models",
                "built-shape",
            )
            for (text, _), names in found.items()
            for folded in fold_names(names)
        )


def _difference(layer: PlannedLayer, built: torch.nn.Module | None) -> str:
    if built is None:
        return f"is in the checkpoint, but the model builds no {layer.module}"
    assert isinstance(built, LinearBase)
    assert layer.stored is not None
    expected = (_output_size(built, layer.shard), built.input_size)
    if expected != (layer.stored.N, layer.stored.K):
        return (
            f"its weight is [{layer.stored.N}, {layer.stored.K}] "
            f"(expected [{expected[0]}, {expected[1]}] by {type(built).__name__})"
        )
    return ""


def _output_size(built: LinearBase, shard: str | int | None) -> int:
    if isinstance(built, QKVParallelLinear) and isinstance(shard, str):
        num_heads = built.total_num_heads if shard == "q" else built.total_num_kv_heads
        head = built.v_head_size if shard == "v" else built.head_size
        return int(num_heads * head)
    if isinstance(built, MergedColumnParallelLinear) and isinstance(shard, int):
        return int(built.output_sizes[shard])
    if isinstance(built, QKVParallelLinear):
        heads = built.total_num_heads + built.total_num_kv_heads
        return int(heads * built.head_size + built.total_num_kv_heads * built.v_head_size)
    return int(built.output_size)
