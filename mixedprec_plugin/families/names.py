"""What a layer name tells: its kind, the fused module that runs it, how ranks split it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Literal, NamedTuple

from mixedprec_plugin.families.config import Config, text_config
from mixedprec_plugin.families.record import Family

Kind = Literal["linear", "expert", "lm_head", "embedding", "router", "norm", "draft", "other"]
Parallel = Literal["column", "row", "replicated"]

# the tensors that are none of a layer's matrix, and stay as precise as they are stored
KV_SUFFIXES = frozenset({"k_scale", "v_scale", "kv_scale", "output_scale"})
_KV_SCALE = re.compile(
    r"(.+?)(\.attn|\.kv_cache|\.qkv_proj|\.[kv]_proj)?\.(kv?|v)_scale|(.+)\.([kv])_proj\.output_scale"
)
_DECODER_LAYER = re.compile(r"(?:(?:model|language_model)\.)+layers\.(\d+)\.")


class ExpertShard(NamedTuple):
    """One projection of one expert: `w1` gate, `w3` up, `w2` down, as SGLang's FusedMoE says."""

    expert: int
    projection: str


# several numbers: a layer that is stored fused, and that SGLang cuts further
Shard = str | int | tuple[int, ...] | ExpertShard | None

NEVER_QUANTIZED: Mapping[str, str] = {
    "lm_head": "few methods serve lm_head, and only where a rule spells its name",
    "embedding": "SGLang never quantizes embeddings",
    "router": "routers stay unquantized",
    "norm": "it has no weight matrix",
    "draft": "the model does not run it, a draft model for speculative decoding does",
    "other": "SGLang runs it unquantized",
}


def last_component(name: str) -> str:
    """`model.layers.0.mlp.up_proj` -> `up_proj`."""
    return name.rpartition(".")[2]


def parent_of(name: str) -> str:
    """`model.layers.0.mlp.up_proj` -> `model.layers.0.mlp`."""
    return name.rpartition(".")[0]


def is_in_decoder(name: str, last: Collection[str]) -> bool:
    """Whether a layer of a decoder block, and not of a tower, has one of these last components."""
    return last_component(name) in last and _DECODER_LAYER.match(name) is not None


def layer_kind(name: str, has_matrix: bool, family: Family) -> Kind:
    """Tell what a layer is by its name and by whether it holds a [N, K] weight."""
    last = last_component(name)
    if last in family.embeddings:
        return "embedding"
    if last in family.lm_heads:
        return "lm_head"
    if re.search(family.routers, name):
        return "router"
    if last in family.plain and has_matrix:
        return "other"
    is_experts = re.search(family.experts, name) is not None
    if not has_matrix:
        return "other" if is_experts else "norm"
    return "expert" if is_experts else "linear"


def draft_layers(config: Config, names: Collection[str], family: Family) -> frozenset[str]:
    """Find the layers that the model itself does not build: those that predict further tokens.

    DeepSeek-V3 and GLM-4.5 store a layer of multi-token prediction behind their last decoder layer,
    Qwen3-Next one below `mtp`. A draft model of speculative decoding is made of it.

    Source: SGLang passes over tensors of layers from `num_hidden_layers` on where
    `num_nextn_predict_layers` is set (models/deepseek_common/deepseek_weight_loader.py:337,
    models/glm4_moe.py:1148), and over those whose name holds "mtp" (models/qwen3_next.py:1186).
    """
    if family.is_draft:
        return frozenset()
    said = text_config(config)
    first = said.get("num_hidden_layers") if said.get("num_nextn_predict_layers") else None
    found = [name for name in names if name.startswith(family.draft_prefixes)]
    if isinstance(first, int):
        matches = ((name, _DECODER_LAYER.match(name)) for name in names)
        found += [name for name, match in matches if match and int(match[1]) >= first]
    return frozenset(found)


def fused_module(name: str, names: Collection[str], family: Family) -> tuple[str, Shard]:
    """Find the module that runs a layer.

    Args:
        names: all layer names of the checkpoint; a lone shard (no siblings) is not fused.
    Returns:
        the module's name, and the shard id that its weight loader takes; the layer's own name and
        None where it is not fused. All experts of a layer are one module.
    """
    parent, _, last = name.rpartition(".")
    if last in family.expert_shards:
        module, _, expert = parent.rpartition(".")
        if expert.isdecimal() and module.endswith(".experts"):
            return module, ExpertShard(int(expert), family.expert_shards[last])
    prefix = f"{parent}." if parent else ""
    for module, shards in family.fused_modules.items():
        is_shard = last in shards and not re.search(family.experts, name)
        if is_shard and all(prefix + sibling in names for sibling in shards):
            return prefix + module, shards[last]
    return name, None


def parallel_kind(name: str, family: Family) -> Parallel:
    """Tell how tensor-parallel ranks split a linear layer: outputs, inputs or not at all."""
    last = last_component(name)
    if last in family.replicated:
        return "replicated"
    return "row" if last in family.row_parallel else "column"


def shard_order(shard: Shard) -> int:
    """Position of a shard in its fused module, as SGLang lays them out: q, k, v; gate, up."""
    if isinstance(shard, ExpertShard):
        return 3 * shard.expert + ("w1", "w3", "w2").index(shard.projection)
    if isinstance(shard, tuple):
        return shard[0]
    return "qkv".index(shard) if isinstance(shard, str) else shard or 0


def scheme_unit(module: str, shard: Shard) -> str:
    """Name of the unit that needs one scheme: a fused module, or one expert of a layer."""
    return f"{module}.{shard.expert}" if isinstance(shard, ExpertShard) else module


def sglang_name(module: str, family: Family) -> str:
    """Name a module, which the plan calls `….self_attn.qkv_proj`, as SGLang's logs do."""
    for pattern, replacement in family.renames.items():
        module = re.sub(pattern, replacement, module)
    return module


class KvScale(NamedTuple):
    """What a scale of the KV cache belongs to: `k`, `v` or `kv` of an attention, by its names."""

    attentions: tuple[str, ...]
    parts: str


def kv_scale(name: str) -> KvScale | None:
    """Tell what a tensor's name says of the KV cache; None if it says nothing.

        k_scale, v_scale at the attention            vLLM, compressed-tensors
            in `attn` or `kv_cache` below it         SGLang, and what it saves
            at k_proj, v_proj or qkv_proj            ModelOpt
        kv_scale at the attention, for both          AutoFP8
        output_scale at k_proj and v_proj            Quark, older compressed-tensors

    Source: `maybe_remap_kv_scale_name` (sglang/srt/model_loader/weight_utils.py:1779) and vLLM's.
    """
    match = _KV_SCALE.fullmatch(name)
    if match is None:
        return None
    attention, inner, parts, projected, projection = match.groups()
    if projected:
        return KvScale((projected,), projection)
    # a model may call the attention itself `attn`
    own = (attention + inner,) if inner == ".attn" else ()
    return KvScale((attention, *own), parts)
