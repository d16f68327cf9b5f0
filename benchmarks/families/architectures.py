"""The families of the table: a tiny config of each, in sizes that blocks of 128 divide."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

VOCAB_SIZE = 512
NUM_EXPERTS = 8

DENSE = {
    "hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 512, "initializer_range": 0.05, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
HEADS = {"head_dim": 64}
EXPERTS = {"moe_intermediate_size": 256, "num_experts_per_tok": 2}
_DEEPSEEK = {
    "num_key_value_heads": 8, "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64,
    "v_head_dim": 64, "n_routed_experts": NUM_EXPERTS, "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A family, as one tiny model of it.

    Attributes:
        name: of its row.
        config_class: name of its config class in transformers.
        settings: what its config is made with.
        extra: what its config.json says beside, because SGLang reads it and transformers 5 leaves
            it out.
        model_class: name of its class in transformers.
        layers: pattern of the layers that take the method; the rest stays as stored.
        experts: pattern of the single experts, `{}` for their ids; empty for a dense model.
        packs_experts: whether experts are stored in MXFP4 as gpt-oss's are.
        unquantized: method (or `*`) -> pattern of layers that stay bf16 under it, because the plan
            refuses them.
    """

    name: str
    config_class: str
    settings: Mapping[str, Any]
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model_class: str = "AutoModelForCausalLM"
    layers: str = "model.layers.*"
    experts: str = ""
    packs_experts: bool = False
    unquantized: Mapping[str, str] = dataclasses.field(default_factory=dict)


def dense(name: str, config_class: str, **settings: Any) -> Architecture:
    """A model without experts."""
    return Architecture(name, config_class, {**DENSE, **settings})


def mixture(name: str, config_class: str, **settings: Any) -> Architecture:
    """A model with experts."""
    return Architecture(
        name,
        config_class,
        {**DENSE, **EXPERTS, **settings},
        experts="model.layers.*.mlp.experts.{}.*",
    )


def _deepseek(
    name: str, config_class: str, extra: Mapping[str, Any], **settings: Any
) -> Architecture:
    return dataclasses.replace(
        mixture(name, config_class, **{**_DEEPSEEK, **settings}),
        extra={"moe_layer_freq": 1, **extra},
        unquantized={"*": "*.kv_b_proj"},
    )


ARCHITECTURES: tuple[Architecture, ...] = (
    dense("Llama", "LlamaConfig", **HEADS),
    dense("Mistral", "MistralConfig", **HEADS, sliding_window=None),
    dense("Qwen2", "Qwen2Config"),
    dense("Qwen3", "Qwen3Config", **HEADS),
    dense(
        "Gemma 3 (text)", "Gemma3TextConfig", **HEADS, tie_word_embeddings=True,
        sliding_window=16, query_pre_attn_scalar=64, _sliding_window_pattern=2,
    ),
    dense("Phi-3", "Phi3Config", original_max_position_embeddings=512),
    dense("OLMo 2", "Olmo2Config"),
    dataclasses.replace(
        mixture(
            "Mixtral", "MixtralConfig", **HEADS, num_local_experts=NUM_EXPERTS,
            sliding_window=None,
        ),
        experts="model.layers.*.block_sparse_moe.experts.{}.*",
    ),
    mixture(
        "Qwen2-MoE", "Qwen2MoeConfig", num_experts=NUM_EXPERTS,
        shared_expert_intermediate_size=256,
    ),
    mixture("Qwen3-MoE", "Qwen3MoeConfig", **HEADS, num_experts=NUM_EXPERTS, norm_topk_prob=True),
    _deepseek(
        "DeepSeek-V2", "DeepseekV2Config", {"scoring_func": "softmax"}, q_lora_rank=None,
        n_group=1, topk_group=1,
    ),
    dataclasses.replace(
        _deepseek(
            "DeepSeek-V3", "DeepseekV3Config",
            {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}, q_lora_rank=128, n_group=2,
            topk_group=1,
        ),
        unquantized={
            "*": "*.kv_b_proj",
            **dict.fromkeys(("gptq", "gptq_int8"), "*.{kv_b_proj,q_a_proj,kv_a_proj_with_mqa}"),
        },
    ),
    dataclasses.replace(
        mixture(
            "GLM-4-MoE", "Glm4MoeConfig", **HEADS, n_routed_experts=NUM_EXPERTS,
            n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1, use_qk_norm=True,
            attention_bias=True,
        ),
        unquantized=dict.fromkeys(("gptq", "gptq_int8"), "*.shared_experts.{gate,up}_proj"),
    ),
    mixture("OLMoE", "OlmoeConfig", num_experts=NUM_EXPERTS, num_key_value_heads=8),
    Architecture(
        "Qwen2.5-VL (text)",
        "Qwen2_5_VLConfig",
        {
            "text_config": {
                **DENSE,
                "rope_parameters": {
                    "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12],
                },
            },
            "vision_config": {
                "depth": 2, "hidden_size": 256, "intermediate_size": 256, "num_heads": 4,
                "out_hidden_size": 512, "fullatt_block_indexes": [1],
            },
            "tie_word_embeddings": False,
        },
        model_class="Qwen2_5_VLForConditionalGeneration",
    ),
)  # fmt: skip


def find(name: str) -> Architecture:
    """The architecture of a row.

    Raises:
        KeyError: there is none.
    """
    return {architecture.name: architecture for architecture in ARCHITECTURES}[name]
