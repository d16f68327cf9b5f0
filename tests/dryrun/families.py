"""The models that are run whole: small configs of real architectures, several methods in each.

Every width is one that eight ranks divide into multiples of 128.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.dryrun.cards import Card
from tests.dryrun.methods import METHODS

# SGLang's own routing, instead of FlashInfer's, which GPUs before 8.9 do not have
TRITON_ROUTING = "SGLANG_OPT_USE_JIT_KERNEL_GROUPED_TOPK"
HIDDEN, VOCABULARY, NUM_LAYERS = 512, 512, 4
_SHARED: Mapping[str, Any] = {
    "hidden_size": HIDDEN, "intermediate_size": 1024, "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": VOCABULARY,
    "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False, "num_experts_per_tok": 2,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Family:
    """An architecture.

    Attributes:
        config_class: name of its config class in transformers.
        settings: what its config is made with.
        extra: what its config.json says beside.
        experts: name of a layer's experts, below the layer.
        first_dense: how many of the first layers have no experts.
        attention: layers that take the attention's method; and the modules that run them.
        dense: the same for an MLP without experts, or shared ones; empty if there is none.
    """

    config_class: str
    settings: Mapping[str, Any]
    experts: str
    attention: Mapping[str, tuple[str, ...]]
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    first_dense: int = 0
    shared: str = ""


_QKV = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
}
FAMILIES: Mapping[str, Family] = {
    "Qwen3-MoE": Family(
        "Qwen3MoeConfig",
        {
            **_SHARED, "head_dim": 128, "moe_intermediate_size": 1024, "num_experts": 8,
            "norm_topk_prob": True,
        },
        "mlp.experts",
        _QKV,
    ),
    "Mixtral": Family(
        "MixtralConfig",
        # SGLang's has heads of hidden_size / num_attention_heads, whatever head_dim says
        {
            **_SHARED, "hidden_size": 1024, "num_attention_heads": 8, "num_local_experts": 8,
            "sliding_window": None,
        },
        "block_sparse_moe.experts",
        _QKV,
    ),
    "DeepSeek-V3": Family(
        "DeepseekV3Config",
        {
            **_SHARED, "num_key_value_heads": 16, "q_lora_rank": 256, "kv_lora_rank": 512,
            "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
            "moe_intermediate_size": 1024, "n_routed_experts": 8, "n_shared_experts": 1,
            "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
        },
        "mlp.experts",
        {
            "self_attn.fused_qkv_a_proj_with_mqa": (
                "self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"
            ),
            "self_attn.q_b_proj": ("self_attn.q_b_proj",),
            "self_attn.kv_b_proj": ("self_attn.kv_b_proj",),
            "self_attn.o_proj": ("self_attn.o_proj",),
        },
        {"moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
        first_dense=1,
        shared="mlp.shared_experts",
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Assignment:
    """The methods of a layer, by their titles.

    Attributes:
        attention: of q_proj, k_proj, v_proj and o_proj, and what an MLA block has of the like.
        latent: of `kv_a_proj_with_mqa` and `q_a_proj` of an MLA block; `attention` if empty.
        absorbed: of `kv_b_proj` of an MLA block.
        mlp: of an MLP without experts, or of shared ones.
        experts: of expert 0, 1, ...; the last for all that follow.
    """

    attention: str
    mlp: str
    experts: tuple[str, ...]
    absorbed: str = "unquantized"
    latent: str = ""


_ALL = ("unquantized", "blockwise_int8", "awq", "gptq_int8")
_FP8 = ("fp8", "fp8_channel", "fp8_block")
# in the order of what they ask of a GPU; the name of each says what it brings
MIXES: Mapping[str, tuple[Assignment, ...]] = {
    "FP8 experts": (
        Assignment("fp8_block", "fp8_block", ("fp8_block",), "fp8_block"),
        Assignment("fp8", "fp8", ("fp8",), "fp8"),
        Assignment("gptq_int4", "awq", ("gptq_int4",), "unquantized", "awq"),
        Assignment(
            "blockwise_int8",
            "fp8_channel",
            (*_ALL, "fp8", "fp8_channel", "fp8_block"),
            "fp8_channel",
        ),
    ),
    "no FP8 experts": (
        Assignment("fp8", "fp8", ("unquantized",), "unquantized"),
        Assignment("awq", "awq", ("awq",)),
        Assignment("gptq_int8", "gptq_int4", ("gptq_int4",), "unquantized", "awq"),
        Assignment("blockwise_int8", "fp8_block", (*_ALL, "gptq_column")),
    ),
    "AWQ beside unquantized": (
        Assignment("awq", "awq", ("unquantized",)),
        *[Assignment("awq", "unquantized", ("unquantized",))] * 3,
    ),
}
_RULES = {method.title: method.rule for method in METHODS}


def needs(mix: str) -> int:
    """The least compute capability that a mix runs on, by SGLang's sources.

    Source: tests/dryrun/expected.py and tests/dryrun/test_experts.py, of each method alone.
    """
    return {"FP8 experts": 89, "no FP8 experts": 80, "AWQ beside unquantized": 75}[mix]


def hardest(card: Card) -> str:
    """The mix with the most methods that runs on a card."""
    return next(mix for mix in MIXES if card.architecture >= needs(mix))


def preset_rules(family: Family, mix: str) -> list[str]:
    """The rules of a mix over a family, as `write_preset` takes them."""
    rules = []
    for layer, given in enumerate(MIXES[mix]):
        where = f"model.layers.{layer}."
        for name, method in _assigned(family, layer, given):
            rules.append(f'match: "{where}{name}", {_RULES[method]}')
    return rules


def _assigned(family: Family, layer: int, given: Assignment) -> Iterator[tuple[str, str]]:
    for names in family.attention.values():
        for name in names:
            yield name, method_of(name, given)
    is_dense = layer < family.first_dense
    if is_dense or family.shared:
        yield f"{'mlp' if is_dense else family.shared}.*_proj", given.mlp
    if is_dense:
        return
    yield f"{family.experts}.*", given.experts[-1]
    for expert, method in enumerate(given.experts[:-1]):
        yield f"{family.experts}.{expert}.*", method


def method_of(name: str, given: Assignment) -> str:
    """The method of one projection of an attention block."""
    last = name.rpartition(".")[2]
    if last == "kv_b_proj":
        return given.absorbed
    if last in ("q_a_proj", "kv_a_proj_with_mqa"):
        return given.latent or given.attention
    return given.attention


def modules(family: Family, layer: int, given: Assignment) -> dict[str, list[str]]:
    """Module below a layer -> methods: one, or its experts' in the order of their groups."""
    found = {module: [method_of(names[0], given)] for module, names in family.attention.items()}
    is_dense = layer < family.first_dense
    if is_dense or family.shared:
        mlp = "mlp" if is_dense else family.shared
        found |= {f"{mlp}.{name}": [given.mlp] for name in ("gate_up_proj", "down_proj")}
    if not is_dense:
        found[family.experts] = list(given.experts)
    return found


def write(name: str, folder: Path) -> Path:
    """Write a random checkpoint of a family, made by transformers."""
    from benchmarks.families.architectures import Architecture
    from benchmarks.families.checkpoints import make_checkpoint

    family = FAMILIES[name]
    architecture = Architecture(name, family.config_class, family.settings, family.extra)
    return make_checkpoint(architecture, folder)
