"""What people serve beside, in the order of how much: a tiny config of each family.

`extra` is what published config.json files say and SGLang reads, and transformers 5 does not write.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from benchmarks.families.architectures import DENSE as _DENSE
from benchmarks.families.architectures import EXPERTS as _EXPERTS
from benchmarks.families.architectures import HEADS as _HEADS
from benchmarks.families.architectures import NUM_EXPERTS, Architecture, dense, find, mixture

_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
}  # fmt: skip
_INTERVAL = {"full_attention_interval": 2}
_SHARED_EXPERT = {
    "num_experts": NUM_EXPERTS, "shared_expert_intermediate_size": 256, "norm_topk_prob": True,
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_interleaved": True}
_MROPE = {"rope_parameters": {**_ROPE, "mrope_section": [12, 10, 10]}}
_PARTIAL = {"rope_parameters": {**_ROPE, "mrope_section": [3, 3, 2], "partial_rotary_factor": 0.25}}
_VISION = {
    "depth": 2, "hidden_size": 256, "intermediate_size": 256, "num_heads": 4, "patch_size": 16,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 512,
    "num_position_embeddings": 64, "deepstack_visual_indexes": [],
}  # fmt: skip
_LATENT = {
    "num_key_value_heads": 8, "q_lora_rank": 128, "kv_lora_rank": 128, "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64, "v_head_dim": 64, "n_routed_experts": NUM_EXPERTS,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
_LOCAL = {"num_local_experts": NUM_EXPERTS, "num_experts_per_tok": 2}
_GRANITE = {
    "logits_scaling": 2.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0,
    "attention_multiplier": 0.125,
}  # fmt: skip
_MAMBA = {"num_hidden_layers": 4, "layers_block_type": ["mamba", "mlp", "mamba", "attention"]}
_LATENT_KEPT = "*.kv_b_proj"
_IS_LINEAR = "linear attention is a Triton kernel"
_IS_MAMBA = "Mamba is a Triton kernel"
_FLAT_HEADS = "attention in torch takes no heads that stand in rows (models/hunyuan.py:362)"


@dataclasses.dataclass(frozen=True)
class Newer:
    """A family.

    Attributes:
        architecture: a tiny model of it.
        kept: pattern of layers that stay bf16, as the plan asks for it; empty if there are none.
        not_on_cpu: why the CPU engine does not run it; empty where it does.
    """

    architecture: Architecture
    kept: str = ""
    not_on_cpu: str = ""


def _beside(architecture: Architecture, **extra: Any) -> Architecture:
    return dataclasses.replace(architecture, extra={**architecture.extra, **extra})


def _visual(name: str, prefix: str, text: Mapping[str, Any], **extra: Any) -> Architecture:
    """A language model with a vision tower."""
    # only Qwen3-VL's tower goes deeper into the language model than its input
    deep = {"deepstack_visual_indexes": [0, 1]} if "VL" in prefix else {}
    vision = {**_VISION, **deep}
    settings = {"text_config": dict(text), "vision_config": vision, "tie_word_embeddings": False}
    config_class, model_class = f"{prefix}Config", f"{prefix}ForConditionalGeneration"
    layers = "model.language_model.layers.*"
    return Architecture(name, config_class, settings, extra, model_class=model_class, layers=layers)


def _within(layers: str, architecture: Architecture) -> Architecture:
    return dataclasses.replace(architecture, layers=layers)


def _of_class(model_class: str, architecture: Architecture) -> Architecture:
    return dataclasses.replace(architecture, model_class=model_class)


NEWER: tuple[Newer, ...] = (
    Newer(find("Llama")),
    Newer(find("Qwen3")),
    Newer(find("Qwen3-MoE")),
    Newer(
        _beside(
            mixture("Qwen3-Next", "Qwen3NextConfig", **_HEADS, **_LINEAR, **_SHARED_EXPERT),
            **_INTERVAL,
        ),
        # SGLang fills each from one tensor, which FP8 a tensor has not
        kept="*.linear_attn.in_proj_{ba,qkvz}",
        not_on_cpu=_IS_LINEAR,
    ),
    Newer(
        _visual(
            "Qwen3.5", "Qwen3_5", {**_DENSE, **_HEADS, **_LINEAR, **_PARTIAL},
            text_config=_INTERVAL,
        ),
        not_on_cpu=_IS_LINEAR,
    ),
    Newer(
        _visual(
            "Qwen3.5-MoE", "Qwen3_5Moe",
            {**_DENSE, **_EXPERTS, **_HEADS, **_LINEAR, **_PARTIAL, **_SHARED_EXPERT},
            text_config=_INTERVAL,
        ),
        not_on_cpu=_IS_LINEAR,
    ),
    Newer(_visual("Qwen3-VL", "Qwen3VL", {**_DENSE, **_HEADS, **_MROPE})),
    Newer(
        _visual(
            "Qwen3-VL-MoE", "Qwen3VLMoe",
            {**_DENSE, **_EXPERTS, **_HEADS, **_MROPE, "num_experts": NUM_EXPERTS},
        )
    ),
    Newer(find("GLM-4-MoE")),
    Newer(mixture("GLM-4.7-Flash", "Glm4MoeLiteConfig", **_LATENT), kept=_LATENT_KEPT),
    Newer(
        _beside(
            mixture(
                "GLM-5", "GlmMoeDsaConfig", **_LATENT, index_head_dim=128, index_n_heads=4,
                index_topk=16,
            ),
            moe_layer_freq=1, topk_method="noaux_tc", scoring_func="sigmoid",
        ),
        kept="*.{kv_b_proj,weights_proj}",
        not_on_cpu="sparse attention is a CUDA kernel",
    ),
    Newer(find("DeepSeek-V3"), kept=_LATENT_KEPT),
    Newer(
        _beside(
            mixture("MiniMax-M2", "MiniMaxM2Config", **_HEADS, num_local_experts=NUM_EXPERTS),
            scoring_func="sigmoid", use_routing_bias=True, use_qk_norm=True,
            qk_norm_type="per_layer", rotary_dim=64,
        ),
        not_on_cpu="its norm of all heads is a CUDA kernel",
    ),
    Newer(
        dataclasses.replace(
            _beside(
                dense(
                    "gpt-oss", "GptOssConfig", **_HEADS, **_LOCAL, sliding_window=16,
                    layer_types=["sliding_attention", "full_attention"],
                ),
                quantization_config={"quant_method": "mxfp4"},
            ),
            # its experts stay as they are stored
            layers="*.self_attn.*",
            packs_experts=True,
        )
    ),
    Newer(dense("Granite 3", "GraniteConfig", **_GRANITE)),
    Newer(dense("Granite 3 MoE", "GraniteMoeConfig", **_LOCAL, **_GRANITE), kept="*.router.layer"),
    Newer(
        dense(
            "Granite 4", "GraniteMoeHybridConfig", **_LOCAL, **_GRANITE, mamba_n_heads=16,
            shared_intermediate_size=256, layer_types=["mamba", "attention"], mamba_d_head=64,
            mamba_d_state=64, mamba_n_groups=1,
        ),
        kept="*.router.layer",
        not_on_cpu=_IS_MAMBA,
    ),
    Newer(
        _beside(
            dense("ERNIE-4.5", "Ernie4_5Config", **_HEADS), architectures=["Ernie4_5_ForCausalLM"]
        )
    ),
    Newer(
        mixture(
            "ERNIE-4.5-MoE", "Ernie4_5_MoeConfig", moe_num_experts=NUM_EXPERTS, moe_k=2,
            moe_num_shared_experts=1, moe_layer_start_index=1,
        ),
        not_on_cpu="SGLang's routing in torch takes no bias of [1, E]",
    ),
    Newer(
        _beside(dense("Hunyuan", "HunYuanDenseV1Config", **_HEADS), use_qk_norm=True),
        not_on_cpu=_FLAT_HEADS,
    ),
    Newer(
        _beside(
            dense(
                "Hunyuan-MoE", "HunYuanMoEV1Config", **_HEADS, num_experts=NUM_EXPERTS, moe_topk=2
            ),
            use_mixed_mlp_moe=True, num_shared_expert=1, use_qk_norm=True, use_cla=False,
            moe_intermediate_size=512,
        ),
        kept="*.gate.wg",
        not_on_cpu=_FLAT_HEADS,
    ),
    Newer(
        _of_class(
            "Llama4ForCausalLM",
            dense(
                "Llama 4", "Llama4TextConfig", **_HEADS, num_local_experts=NUM_EXPERTS,
                intermediate_size_mlp=512, num_experts_per_tok=1, interleave_moe_layer_step=2,
            ),
        )
    ),
    Newer(find("Gemma 3 (text)")),
    Newer(
        _of_class(
            "Gemma3nForCausalLM",
            dense(
                "Gemma 3n", "Gemma3nTextConfig", **_HEADS, tie_word_embeddings=True,
                sliding_window=16, num_kv_shared_layers=0, hidden_size_per_layer_input=128,
                vocab_size_per_layer_input=512, laurel_rank=64,
                activation_sparsity_pattern=[0.0, 0.0],
                layer_types=["sliding_attention", "full_attention"],
            ),
        ),
        not_on_cpu="SGLang divides its list of sizes by a number (configs/update_config.py:188)",
    ),
    Newer(dense("Phi-4", "Phi3Config", original_max_position_embeddings=512)),
    Newer(
        _beside(
            _within(
                "backbone.layers.*",
                dense(
                "Nemotron-H", "NemotronHConfig", **{**_DENSE, **_HEADS, **_MAMBA},
                mamba_num_heads=16, mamba_head_dim=64, ssm_state_size=64, n_groups=2,
            ),
            ),
            **_MAMBA, layer_types=None, mtp_layers_block_type=["attention", "moe"],
            mamba_n_groups=2,
        ),
        not_on_cpu=_IS_MAMBA,
    ),
)  # fmt: skip
