"""The modules that a model built, held against the plan before a weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
)
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

from mixedprec_plugin.errors import LoadError, Problem
from mixedprec_plugin.families.names import ExpertShard, Shard
from mixedprec_plugin.methods.shapes import fp8_marlin_fault
from mixedprec_plugin.plan.folding import fold_names
from mixedprec_plugin.plan.model import PlannedLayer
from mixedprec_plugin.serving.config import MixedPrecisionConfig
from mixedprec_plugin.serving.stages import Stage


def check_built(config: MixedPrecisionConfig, stage: Stage) -> None:
    """Check that the model built every planned linear layer, in a shape that its kernel takes.

    Args:
        config: that the model was built with.
        stage: the part of the model that this rank runs.

    Raises:
        LoadError: a layer that nothing runs, or one of another shape than planned or than this GPU
            takes; all are named.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for module, layers in config.plan.modules.items():
        if all(layer.kind not in ("linear", "expert") for layer in layers):
            continue
        built = config.built.get(module)
        for layer in filter(stage.runs, layers):
            text = _difference(layer, built, layers)
            if text:
                found.setdefault((text, module if built is None else ""), []).append(layer.name)
    problems = [
        Problem(folded, text, "config.json and weights are of different models", "built-shape")
        for (text, _), names in found.items()
        for folded in fold_names(names)
    ]
    if problems := problems or _kernel_problems(config):
        raise LoadError(problems)


def _kernel_problems(config: MixedPrecisionConfig) -> list[Problem]:
    """What only this GPU refuses: FP8 without FP8 units runs in Marlin kernels, which have tiles.

    The plan refuses it where it knows the GPU and the layer's method; a layer under `auto` is known
    as SGLang built it.

    Source: `Fp8LinearMethod.use_marlin` (fp8.py:518).
    """
    found: dict[str, list[str]] = {}
    built: Any
    for module, built in config.built.items():
        if not isinstance(built, LinearBase) or not getattr(
            built.quant_method, "use_marlin", False
        ):
            continue
        text = fp8_marlin_fault(built.output_size_per_partition, built.input_size_per_partition)
        if text:
            found.setdefault(text, []).append(module)
    return [
        Problem(
            folded, text, "give it another method, or use fewer tensor-parallel ranks", "gpu-shape"
        )
        for text, names in found.items()
        for folded in fold_names(names)
    ]


def _difference(
    layer: PlannedLayer, built: torch.nn.Module | None, shards: Sequence[PlannedLayer]
) -> str:
    if built is None:
        return f"is in the checkpoint, but the model builds no {layer.module}"
    assert layer.stored is not None
    if isinstance(built, FusedMoE):
        return _expert_difference(layer, built)
    assert isinstance(built, LinearBase)
    expected = (_output_size(built, layer.shard), built.input_size)
    N, whose = layer.stored.N, "its weight is"
    if isinstance(built, ReplicatedLinear) and layer.shard is not None:
        # it knows nothing of its shards' sizes
        N = sum(shard.stored.N for shard in shards if shard.stored is not None)
        whose = f"the weights of {layer.module} are"
    # under `auto` a layer may be stored in a format that we know by name only
    if layer.stored.N and expected != (N, layer.stored.K):
        return (
            f"{whose} [{N}, {layer.stored.K}] "
            f"(expected [{expected[0]}, {expected[1]}] by {type(built).__name__})"
        )
    return ""


def _expert_difference(layer: PlannedLayer, built: FusedMoE) -> str:
    assert layer.stored is not None
    if not isinstance(layer.shard, ExpertShard):
        return f"is no projection of an expert, the model builds {type(built).__name__} for it"
    if layer.shard.expert >= built.num_experts:
        return f"is expert {layer.shard.expert} of a layer with {built.num_experts}"
    inner = built.intermediate_size_per_partition * built.moe_tp_size
    expected = (
        (built.hidden_size, inner) if layer.shard.projection == "w2" else (inner, built.hidden_size)
    )
    # as above
    if layer.stored.N and layer.stored.K and expected != (layer.stored.N, layer.stored.K):
        return (
            f"its weight is [{layer.stored.N}, {layer.stored.K}] "
            f"(expected [{expected[0]}, {expected[1]}] by {type(built).__name__})"
        )
    return ""


def _output_size(built: LinearBase, shard: Shard) -> int:
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
