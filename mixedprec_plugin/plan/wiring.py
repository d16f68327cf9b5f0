"""Which layers read a norm's output, and which layer's outputs another reads, told by names.

A tool that smooths weights (AWQ, SmoothQuant) multiplies the columns of a layer and divides what
comes before: the norm whose output the layer reads, or the rows of the layer before it.

    norm                                      its consumers
    input_layernorm                           q, k, v (q_a, kv_a), and where there is no other norm
                                              before it, the MLP (parallel blocks: Cohere, Falcon)
    post_attention_layernorm                  gate, up, router, experts, shared experts
    pre_feedforward_layernorm (Gemma)         the same; post_attention_layernorm is then no input
    post_*layernorm of OLMo 2, Exaone 4       none: they come after o_proj and down_proj
    q_a_layernorm, kv_a_layernorm (DeepSeek)  q_b_proj, kv_b_proj
    the last norm                             lm_head, or the embedding that it is tied to

    producer   its consumer
    v_proj     o_proj
    up_proj    down_proj, for each expert, too

Families that are not listed here, and norms of other names, are not guessed at: all layers beside
such a norm (below its parent) count as its consumers, and none of them may be rescaled.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mixedprec_plugin.plan.architecture import last_component
from mixedprec_plugin.plan.model import PlannedLayer

# model_type of families whose norms scale by w
_PLAIN = frozenset({
    "llama", "mistral", "ministral", "ministral3", "mixtral", "qwen2", "qwen2_moe", "qwen2_vl",
    "qwen2_5_vl", "qwen3", "qwen3_moe", "qwen3_vl", "qwen3_vl_moe", "deepseek_v2", "deepseek_v3",
    "deepseek_v32", "kimi_k2", "glm4", "glm4_moe", "phi3", "phimoe", "granite", "granitemoe",
    "olmoe", "olmo2", "olmo3", "exaone4", "seed_oss", "minicpm", "ernie4_5", "ernie4_5_moe",
    "smollm3", "cohere", "cohere2", "starcoder2", "stablelm", "gpt_oss", "minimax_m2", "baichuan",
    "apertus", "arcee",
})  # fmt: skip
# model_type of families whose norms scale by 1 + w
_OFFSET = frozenset({
    "gemma", "gemma2", "gemma3", "gemma3_text", "t5gemma", "vaultgemma", "nemotron", "qwen3_next",
    "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text",
})  # fmt: skip
_BLOCK = re.compile(r"(.*?\.\d+)\.(.+)")
_ATTENTION = frozenset({"self_attn", "attention", "attn", "linear_attn"})
_MLP = frozenset({"mlp", "block_sparse_moe", "feed_forward", "moe"})
_ATTENTION_INPUTS = frozenset({
    "q_proj", "k_proj", "v_proj", "qkv_proj", "q_a_proj", "kv_a_proj_with_mqa", "in_proj_qkvz",
    "in_proj_ba", "in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "W_pack",
    "query_key_value",
})  # fmt: skip
_MLP_INPUTS = frozenset({
    "gate_proj", "up_proj", "gate_up_proj", "w1", "w3", "gate", "router", "shared_expert_gate",
    "fc1", "c_fc",
})  # fmt: skip
_OUTPUTS = frozenset({"o_proj", "out_proj", "dense", "wo", "down_proj", "w2", "fc2", "c_proj"})
_LATENT = {"q_a_layernorm": "q_b_proj", "kv_a_layernorm": "kv_b_proj"}
_VALUES = ("v_proj", "qkv_proj", "kv_b_proj", "W_pack", "query_key_value")
_PRODUCERS: Mapping[str, tuple[str, ...]] = {
    "o_proj": _VALUES, "out_proj": _VALUES, "dense": _VALUES, "wo": _VALUES,
    "down_proj": ("up_proj", "gate_up_proj"), "w2": ("w3", "w1"), "fc2": ("fc1",),
    "c_proj": ("c_fc", "v_proj"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Unit:
    """A norm and the layers that are right only behind it.

    Attributes:
        norm: layer name; of what is no norm (a router's bias, a short convolution), too.
        consumers: names of the layers that read its output.
        fixed: layers that may be consumers, so that they must come with it and are never rescaled.
    """

    norm: str
    consumers: tuple[str, ...]
    fixed: tuple[str, ...] = ()


def model_type(config: Mapping[str, Any]) -> str:
    """The `model_type` of the language model that config.json describes."""
    text = config.get("text_config")
    inner = text.get("model_type") if isinstance(text, Mapping) else None
    return str(inner or config.get("model_type") or "")


def norm_offset(config: Mapping[str, Any]) -> float | None:
    """What a norm adds to its weight before it scales: 0 or 1; None where we do not know."""
    kind = model_type(config)
    return 0.0 if kind in _PLAIN else 1.0 if kind in _OFFSET else None


def coupled_units(
    layers: Sequence[PlannedLayer], tied: Mapping[str, str], config: Mapping[str, Any]
) -> list[Unit]:
    """List every norm with its consumers.

    Args:
        layers: of the whole model.
        tied: tied layer name -> the layer whose weight it shares.
        config: the model's config.json.
    """
    is_known = norm_offset(config) is not None
    blocks: dict[str, list[PlannedLayer]] = {}
    outside: list[PlannedLayer] = []
    for layer in layers:
        match = _BLOCK.match(layer.name)
        blocks.setdefault(match[1], []).append(layer) if match else outside.append(layer)
    units = [unit for name, block in blocks.items() for unit in _block_units(name, block, is_known)]
    return units + _outer_units(outside, tied, is_known)


def producers(layers: Mapping[str, PlannedLayer]) -> list[tuple[str, str]]:
    """List (producer, consumer) of layers whose outputs another layer of the same module reads.

    Args:
        layers: layer name -> layer.
    """
    found = []
    for name in layers:
        parent, _, last = name.rpartition(".")
        for candidate in _PRODUCERS.get(last, ()):
            if (producer := f"{parent}.{candidate}") in layers:
                found.append((producer, name))
                break
    return found


def _block_units(block: str, layers: Sequence[PlannedLayer], is_known: bool) -> list[Unit]:
    norms = [layer.name for layer in layers if layer.kind == "norm"]
    matrices = [layer.name for layer in layers if layer.kind != "norm"]
    ends = {name.removeprefix(f"{block}.") for name in norms}
    units = []
    for norm in norms:
        parent, _, last = norm.rpartition(".")
        unit = _known_unit(block, norm, ends, matrices) if is_known else None
        if unit is None and last in _LATENT and is_known:
            unit = Unit(norm, tuple(n for n in matrices if n == f"{parent}.{_LATENT[last]}"))
        if unit is None:
            # parameters that stand at a module itself (`self_attn.sinks`) go with what is below it
            inside = tuple(name for name in matrices if name.startswith(f"{norm}."))
            beside = tuple(name for name in matrices if name.startswith(f"{parent}."))
            unit = Unit(norm, (), inside or beside)
        units.append(unit)
    return units


def _known_unit(block: str, norm: str, norms: set[str], matrices: list[str]) -> Unit | None:
    """The consumers of a norm at a block's top; None where its name does not tell."""
    end = norm.removeprefix(f"{block}.")
    is_gemmas = "pre_feedforward_layernorm" in norms
    before_mlp = "pre_feedforward_layernorm" if is_gemmas else "post_attention_layernorm"
    if end == "input_layernorm":
        modules = _ATTENTION if before_mlp in norms else _ATTENTION | _MLP
    elif end == before_mlp and "input_layernorm" in norms:
        modules = _MLP
    else:
        return None
    consumers, fixed = [], []
    for name in matrices:
        child = name.removeprefix(f"{block}.")
        top, last = child.partition(".")[0], last_component(child)
        if top in modules and last in (_ATTENTION_INPUTS if top in _ATTENTION else _MLP_INPUTS):
            consumers.append(name)
        elif (top in modules or top not in _ATTENTION | _MLP) and not (
            last in _OUTPUTS or last in _LATENT.values()
        ):
            fixed.append(name)
    return Unit(norm, tuple(consumers), tuple(fixed))


def _outer_units(
    layers: Sequence[PlannedLayer], tied: Mapping[str, str], is_known: bool
) -> list[Unit]:
    heads = tuple(layer.name for layer in layers if layer.kind == "lm_head")
    readers = heads or tuple(tied.values())
    norms = [layer.name for layer in layers if layer.kind == "norm"]
    is_last = is_known and len(norms) == 1 and last_component(norms[0]).endswith("norm")
    if is_last and heads:
        return [Unit(norms[0], heads)]
    return [Unit(norm, (), readers) for norm in norms]
