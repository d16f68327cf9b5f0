"""What a layer name tells: its kind, the fused module that runs it, how ranks split it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Literal, NamedTuple

Kind = Literal["linear", "expert", "lm_head", "embedding", "router", "norm", "draft", "other"]
Parallel = Literal["column", "row", "replicated"]

# last component of a fused module -> last components of its shards, in SGLang's order, with the
# shard ids that SGLang's weight loaders take (layers/linear.py, `weight_loader_v2`)
FUSED_MODULES: Mapping[str, Mapping[str, str | int]] = {
    "qkv_proj": {"q_proj": "q", "k_proj": "k", "v_proj": "v"},
    "gate_up_proj": {"gate_proj": 0, "up_proj": 1},
    "fused_qkv_a_proj_with_mqa": {"q_a_proj": 0, "kv_a_proj_with_mqa": 1},
}
_FUSED_BY_SHARD = {
    shard: (module, index)
    for module, shards in FUSED_MODULES.items()
    for shard, index in shards.items()
}
_ROW_PARALLEL = {"o_proj", "down_proj", "out_proj", "dense_4h_to_h", "wo", "w2", "c_proj", "fc2"}
_REPLICATED = {"q_a_proj", "kv_a_proj_with_mqa"}
_EMBEDDINGS = {
    "embed_tokens", "wte", "wpe", "word_embeddings", "embed_in", "tok_embeddings",
    "position_embedding",
}  # fmt: skip
_LM_HEADS = {"lm_head", "embed_out"}
_ROUTERS = re.compile(r"(?:^|\.)(?:mlp\.gate|block_sparse_moe\.gate|router|shared_expert_gate)$")
_EXPERT = re.compile(r"\.experts(?:\.\d+)?(?:\.|$)")
# projection of one expert -> the shard id that FusedMoE's weight loader takes
_EXPERT_SHARDS = {
    "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2", "w1": "w1", "w3": "w3", "w2": "w2",
}  # fmt: skip


class ExpertShard(NamedTuple):
    """One projection of one expert: `w1` gate, `w3` up, `w2` down, as SGLang's FusedMoE says."""

    expert: int
    projection: str


Shard = str | int | ExpertShard | None

NEVER_QUANTIZED: Mapping[str, str] = {
    "lm_head": "SGLang has no quantized kernel for lm_head",
    "embedding": "SGLang never quantizes embeddings",
    "router": "routers stay unquantized",
    "norm": "it has no weight matrix",
    "draft": "the model does not run it, a draft model for speculative decoding does",
    "other": "SGLang runs it unquantized",
}


def last_component(name: str) -> str:
    """`model.layers.0.mlp.up_proj` -> `up_proj`."""
    return name.rpartition(".")[2]


def layer_kind(name: str, has_matrix: bool) -> Kind:
    """Tell what a layer is by its name and by whether it holds a [N, K] weight."""
    last = last_component(name)
    if last in _EMBEDDINGS:
        return "embedding"
    if last in _LM_HEADS:
        return "lm_head"
    if _ROUTERS.search(name):
        return "router"
    if not has_matrix:
        return "other" if _EXPERT.search(name) else "norm"
    return "expert" if _EXPERT.search(name) else "linear"


def fused_module(name: str, names: Collection[str]) -> tuple[str, Shard]:
    """Find the module that runs a layer.

    Args:
        name: layer name.
        names: all layer names of the checkpoint; a lone shard (no siblings) is not fused.
    Returns:
        the module's name, and the shard id that its weight loader takes; the layer's own name and
        None where it is not fused. All experts of a layer are one module.
    """
    parent, _, last = name.rpartition(".")
    if last in _EXPERT_SHARDS:
        module, _, expert = parent.rpartition(".")
        if expert.isdecimal() and module.endswith(".experts"):
            return module, ExpertShard(int(expert), _EXPERT_SHARDS[last])
    if last in _FUSED_BY_SHARD and not _EXPERT.search(name):
        module, shard = _FUSED_BY_SHARD[last]
        prefix = f"{parent}." if parent else ""
        if all(prefix + sibling in names for sibling in FUSED_MODULES[module]):
            return prefix + module, shard
    return name, None


def parallel_kind(name: str) -> Parallel:
    """Tell how tensor-parallel ranks split a linear layer: outputs, inputs or not at all."""
    last = last_component(name)
    if last in _REPLICATED:
        return "replicated"
    return "row" if last in _ROW_PARALLEL else "column"


def shard_order(shard: Shard) -> int:
    """Position of a shard in its fused module, as SGLang lays them out: q, k, v; gate, up."""
    if isinstance(shard, ExpertShard):
        return 3 * shard.expert + ("w1", "w3", "w2").index(shard.projection)
    return "qkv".index(shard) if isinstance(shard, str) else shard or 0


def scheme_unit(module: str, shard: Shard) -> str:
    """Name of the unit that needs one scheme: a fused module, or one expert of a layer."""
    return f"{module}.{shard.expert}" if isinstance(shard, ExpertShard) else module
