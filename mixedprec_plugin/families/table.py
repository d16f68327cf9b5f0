"""The table of families. Adding one is a record here and a row in tests/families/test_records.py.

What is not in the table is not guessed at: such a model has the usual layer names, and nothing is
known of its norms or of what SGLang's class of it does. Line numbers are SGLang 0.5.23's, below
sglang/srt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from mixedprec_plugin.families.config import Config, architecture, model_type
from mixedprec_plugin.families.parts import PARTS, other_parts
from mixedprec_plugin.families.record import Family

DECODER = Family()

# Names of checkpoints that transformers wrote since 4.52 go first: the model's class ends in a
# KeyError of them. Source: layers/attention/vision.py:1205, :1233.
_VISION = {
    r"\.attn\.qkv$": ".attn.qkv_proj",
    r"(vision_tower\..*)\.self_attn\.out_proj$": r"\1.self_attn.proj",
}

_Q, _KV = "num_attention_heads * head_dim", "num_key_value_heads * head_dim"
_SHAPES = {
    "q_proj": (_Q, "hidden_size"), "k_proj": (_KV, "hidden_size"), "v_proj": (_KV, "hidden_size"),
    "o_proj": ("hidden_size", _Q), "gate_proj": ("intermediate_size", "hidden_size"),
    "up_proj": ("intermediate_size", "hidden_size"),
    "down_proj": ("hidden_size", "intermediate_size"), "input_layernorm": ("hidden_size",),
    "post_attention_layernorm": ("hidden_size",), "norm": ("hidden_size",),
    "embed_tokens": ("vocab_size", "hidden_size"), "lm_head": ("vocab_size", "hidden_size"),
}  # fmt: skip

# models/qwen2_5_vl.py:693, :723
_QWEN_2_5_VL = Family(
    ("Qwen2_5_VLForConditionalGeneration",),
    ("qwen2_5_vl",),
    norm_offset=0.0,
    renames={
        r"^model\.language_model\.": "model.",
        r"^model\.visual\.": "visual.",
        **_VISION,
    },
    not_loaded={
        r"model\.(language_model|visual)\.": "rename model.language_model.* to model.* and "
        "model.visual.* to visual.*",
    },
)

# models/qwen3_next.py:311, :338
_QWEN_3_NEXT = Family(
    ("Qwen3NextForCausalLM",),
    ("qwen3_next",),
    norm_offset=1.0,
    asked_for_weight=frozenset({"in_proj_qkvz", "in_proj_ba"}),
    drafts_with="Qwen3NextForCausalLMMTP",
)
# `shared_experts_fusion_disable_reason`, models/deepseek_v2.py:3315
_DEEPSEEK_V3 = Family(
    ("DeepseekV3ForCausalLM",),
    ("deepseek_v3", "kimi_k2"),
    norm_offset=0.0,
    fuses_shared_experts=lambda config: config.get("n_routed_experts") == 256,
    drafts_with="DeepseekV3ForCausalLMNextN",
)
# models/glm4_moe.py:1012, 503
_GLM_4_MOE = Family(
    ("Glm4MoeForCausalLM",),
    ("glm4_moe",),
    norm_offset=0.0,
    fuses_shared_experts=lambda _config: True,
    has_biased_router=True,
    dtype_readers={".shared_experts.gate_up_proj": "GLM-4-MoE"},
    drafts_with="Glm4MoeForCausalLMNextN",
)
# models/deepseek_nextn.py:98, models/glm4_moe_nextn.py:67, deepseek_weight_loader.py:574
_NEXT_N = {
    r"^model\.layers\.\d+\.(?=(?:eh_proj|enorm|hnorm|shared_head\.norm)$)": "model.",
    r"^model\.layers\.\d+\.": "model.decoder.",
}


def _draft_of(family: Family, renames: Mapping[str, str], plain: str) -> Family:
    """The draft model that SGLang makes of a family's layers of multi-token prediction."""
    return dataclasses.replace(
        family,
        architectures=(family.drafts_with,),
        model_types=(),
        renames=renames,
        plain=frozenset({plain}),
        is_draft=True,
        drafts_with="",
    )


FAMILIES = (
    Family(
        ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"),
        ("llama", "mistral", "qwen2", "qwen3"),
        norm_offset=0.0,
        shapes=_SHAPES,
    ),
    # models/gpt_oss.py:545: attention is built without the model's config
    Family(
        ("GptOssForCausalLM",),
        ("gpt_oss",),
        norm_offset=0.0,
        unasked="sglang.srt.models.gpt_oss:GptOssAttention",
    ),
    # of these, no more is known than that their norms scale by w
    Family(
        model_types=(
            "baichuan", "deepseek_v2", "deepseek_v32", "ernie4_5", "ernie4_5_moe", "glm4",
            "granite", "granitemoe", "minicpm", "minimax_m2", "ministral", "ministral3",
            "phi3", "phimoe", "qwen2_moe", "qwen3_moe", "qwen3_vl", "qwen3_vl_moe",
            "qwen3_vl_moe_text", "qwen3_vl_text", "seed_oss", "smollm3", "starcoder2",
        ),
        norm_offset=0.0,
    ),
    # one norm a block, or with some of StableLM's
    Family(
        model_types=("cohere", "cohere2", "stablelm"),
        norm_offset=0.0,
        parts=other_parts("input_layernorm", "self_attn input_layernorm|layer_norm1 &mlp"),
    ),
    # an MLP without a gate
    Family(
        model_types=("apertus", "arcee"),
        norm_offset=0.0,
        parts=other_parts(
            "gate_proj", "up_proj &down_proj", "attention_layernorm feedforward_layernorm"
        ),
    ),
    # norms behind attention and MLP
    Family(
        model_types=("exaone4", "olmo2", "olmo3"),
        norm_offset=0.0,
        parts=other_parts(
            "input_layernorm pre_feedforward_layernorm",
            "post_attention_layernorm post_feedforward_layernorm &self_attn &mlp",
        ),
    ),
    # and of these that they scale by 1 + w
    Family(
        model_types=(
            "gemma", "gemma2", "gemma3_text", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text",
            "qwen3_5_text",
        ),
        norm_offset=1.0,
    ),
    _QWEN_3_NEXT,
    # models/qwen3_next_mtp.py:62; models/qwen3_next.py:1181
    _draft_of(_QWEN_3_NEXT, {r"^mtp\.(fc|pre_fc_norm_\w+)$": r"\1", r"^mtp\.": "model."}, "fc"),
    # and of these that they have other parts, too
    Family(
        model_types=("nemotron", "t5gemma", "vaultgemma"),
        norm_offset=1.0,
        parts=other_parts("gate_proj input_layernorm pre_feedforward_layernorm"),
    ),
    # models/mixtral.py:303
    Family(
        ("MixtralForCausalLM",),
        ("mixtral",),
        norm_offset=0.0,
        renames={r"^model\.layers\.": "layers."},
    ),
    # models/olmoe.py:155, 191: norms of q and k as wide as the hidden state, on a rank's heads
    Family(("OlmoeForCausalLM",), ("olmoe",), norm_offset=0.0, has_joint_head_norms=True),
    _DEEPSEEK_V3,
    _draft_of(_DEEPSEEK_V3, _NEXT_N, "eh_proj"),
    _GLM_4_MOE,
    _draft_of(_GLM_4_MOE, _NEXT_N, "eh_proj"),
    _QWEN_2_5_VL,
    dataclasses.replace(
        _QWEN_2_5_VL,
        architectures=("Qwen2VLForConditionalGeneration",),
        model_types=("qwen2_vl",),
        parts=(*PARTS, "merger.ln_q merger.ln_q.bias"),
    ),
    # models/gemma3_mm.py:188, :198
    Family(
        ("Gemma3ForConditionalGeneration",),
        ("gemma3",),
        norm_offset=1.0,
        renames={
            r"^model\.language_model\.": "language_model.model.",
            r"^model\.vision_tower\.": "vision_tower.",
            **_VISION,
        },
        parts=(*PARTS, "embeddings.patch_embedding.bias post_layernorm.bias post_layernorm"),
        not_loaded={
            r"model\.(language_model|vision_tower|multi_modal_projector)\.": "rename "
            "model.language_model.* to language_model.model.*, and take model. off the rest",
            r"vision_tower\.(?!vision_model\.)": "rename vision_tower.* to "
            "vision_tower.vision_model.*",
        },
    ),
)  # fmt: skip
_BY_ARCHITECTURE = {name: family for family in FAMILIES for name in family.architectures}
# of SGLang's class for a larger model around a language model, nothing is known
_BY_MODEL_TYPE = {
    name: dataclasses.replace(DECODER, norm_offset=family.norm_offset, parts=family.parts)
    for family in FAMILIES
    for name in family.model_types
}


def is_in_table(config: Config) -> bool:
    """Whether the model as a whole is known, and not the language model within it alone."""
    return architecture(config) in _BY_ARCHITECTURE or config.get("model_type") in _BY_MODEL_TYPE


def family_of(config: Config) -> Family:
    """Find the record of a model by its config.json; `DECODER` where there is none."""
    known = _BY_ARCHITECTURE.get(architecture(config))
    return known or _BY_MODEL_TYPE.get(model_type(config), DECODER)
