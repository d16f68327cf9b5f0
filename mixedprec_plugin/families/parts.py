"""What the modules of a model are made of: layers, parameters and modules that go together.

One text a group, one word a member: its name in the module, or below one of the module's modules
(`merger.norm`), or several names of which there is one (`o_proj|out_proj`); `.bias` is a layer's.
A module that has one member has all of them. A word behind `&` is asked for and asks for nothing
itself, because it stands in other groups, too.

Source: transformers' models, which tests/families/test_whole.py holds them against.
"""

from __future__ import annotations

_GDN = "&A_log &dt_bias &conv1d &norm &out_proj"
_OUT = "&o_proj|out_proj|dense|proj|c_proj"
PARTS = (
    # attention
    f"k_proj v_proj &q_proj {_OUT}",
    "o_proj &q_proj|q_b_proj|qkv_proj|query_key_value|W_pack",
    f"qkv_proj|query_key_value|qkv|W_pack|c_attn {_OUT}",
    "q_norm &k_norm",
    "k_norm &q_norm|wk",
    "q_layernorm k_layernorm",
    "q_proj.bias k_proj.bias v_proj.bias",
    "q_a_proj q_a_layernorm q_b_proj",
    "kv_a_proj_with_mqa kv_a_layernorm kv_b_proj &q_proj|q_b_proj &o_proj",
    "q_a_proj.bias kv_a_proj_with_mqa.bias",
    "wq_b wk weights_proj k_norm.bias &k_norm",
    f"in_proj_qkv in_proj_z in_proj_b in_proj_a {_GDN}",
    f"in_proj_qkvz in_proj_ba {_GDN}",
    "D &in_proj &A_log &conv1d &out_proj &dt_bias|dt_proj",
    # MLPs and experts
    "gate_proj up_proj &down_proj",
    "down_proj &up_proj|gate_up_proj",
    "gate_up_proj &down_proj",
    "gate_proj.bias up_proj.bias down_proj.bias",
    "w1 w2 w3",
    "fc1 fc2",
    "fc1.bias fc2.bias",
    "c_fc &c_proj",
    "c_proj &c_fc|c_attn",
    "input_linear output_linear",
    "experts &gate|router",
    "gate|router &experts|input_linear",
    "shared_expert shared_expert_gate &gate &experts",
    "shared_experts &gate|router &experts",
    # blocks
    "input_layernorm post_attention_layernorm "
    "&self_attn|linear_attn|cross_attn|mamba &mlp|block_sparse_moe|moe|feed_forward",
    "pre_feedforward_layernorm post_feedforward_layernorm &input_layernorm",
    "post_self_attn_layernorm post_mlp_layernorm",
    # layers that predict further tokens
    "enorm hnorm eh_proj",
    "pre_fc_norm_embedding pre_fc_norm_hidden fc",
    # what sees
    "linear_fc1 linear_fc2",
    "linear_fc1.bias linear_fc2.bias",
    "linear_1 linear_2",
    "linear_1.bias linear_2.bias",
    "layer_norm2 &layer_norm1",
    "attention_norm ffn_norm",
    "norm1 norm2",
    "norm1.bias norm2.bias",
    "ln_1 ln_2",
    "patch_embed.proj blocks",
    "pos_embed patch_embed.proj.bias &patch_embed.proj",
    "merger.norm merger.norm.bias merger.linear_fc1 merger.linear_fc1.bias",
    "merger.mlp.0 merger.mlp.2 merger.ln_q",
    "merger.mlp.0.bias merger.mlp.2.bias",
    "post_layernorm post_layernorm.bias embeddings.position_embedding &embeddings.patch_embedding",
    "pre_layrnorm pre_layrnorm.bias embeddings.class_embedding",
    "probe layernorm layernorm.bias attention.in_proj_weight attention.in_proj_bias "
    "attention.out_proj attention.out_proj.bias",
    "ln_pre patch_conv",
    "multi_modal_projector.norm multi_modal_projector.patch_merger",
    "mm_input_projection_weight mm_soft_emb_norm",
)


def other_parts(without: str, *parts: str) -> tuple[str, ...]:
    """`PARTS` but for groups that begin with some words, and a model's own in their place."""
    dropped = tuple(f"{word} " for word in without.split())
    return (*(part for part in PARTS if not part.startswith(dropped)), *parts)
