"""The record of a model family: all that the package knows of an architecture, in one place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Set
from typing import Any

from mixedprec_plugin.families.parts import PARTS


def _usual(value: Any) -> Any:
    """A field whose default is a set or a mapping; nobody changes it."""
    return dataclasses.field(default_factory=lambda: value)


# embeddings of positions among a family's `embeddings`
POSITIONS = frozenset({"wpe", "position_embedding"})
_VALUES = ("v_proj", "qkv_proj", "kv_b_proj", "W_pack", "query_key_value")


@dataclasses.dataclass(frozen=True)
class Family:
    """An architecture, or a few that are close kin; the defaults are the usual, and no guess.

    Where a field holds names without a dot, they are last components of layer names.

    Attributes:
        architectures: as config.json spells them; SGLang picks its class by a model's first.
        model_types: what config.json calls the language model. Within a larger model, of another
            architecture, they tell the norms and no more.
        norm_offset: what norms add to their weight before they scale, 0 or 1; None where that is
            not known: then nothing is known of what reads a norm, and no layer is rescaled.
        shapes: layer -> the shape of its weight in config.json's words, where it spells them out.
        renames: pattern -> replacement, in turn: from a checkpoint's modules to SGLang's names.
        not_loaded: pattern of layer names that SGLang's class does not load -> remedy.
        fuses_shared_experts: config.json -> whether SGLang by itself would run a shared expert as
            one more routed expert.
        has_biased_router: whether a bias chooses the experts, whatever config.json says.
        has_joint_head_norms: whether the norms of q and k are as wide as all heads of q, so that
            ranks cannot split the heads, nor k have fewer.
        dtype_readers: end of a module's name -> what in SGLang looks at the dtype of its weight.
        unasked: SGLang's class of a module that takes a quantization config and is given none by
            its model, as lazy `package.module:Class`; empty if there is none.
        asked_for_weight: modules of which SGLang's class wants a tensor `weight` when it builds
            them, and which it fills from one stored tensor.
        draft_prefixes: how names of layers start that only a draft model runs.
        drafts_with: architecture of the draft model that SGLang makes of a model's own layers of
            multi-token prediction; empty where it makes none, or none that is known.
        is_draft: whether it is such a draft model, whose embedding and head are its model's.
        plain: matrices that SGLang's class builds as torch's own layers, in floats.
        embeddings, lm_heads: such layers.
        routers, experts: patterns of the names of routers, and of what belongs to routed experts.
        float32: pattern of the tensors that models keep in float32 whatever they run in: biases
            that choose experts, decays and states of linear attention and Mamba. In SGLang:
            models/nemotron_h.py:273, models/qwen3_next.py:218, layers/attention/mamba/mamba.py:409.
        computed: layers that old checkpoints carry and every model computes by itself.
        expert_shards: projection of one expert -> the shard id that SGLang's FusedMoE takes.
        parts: what goes together in a module, see `families.parts`.
        fused_modules: fused module -> its shards in SGLang's order, with the ids that SGLang's
            weight loaders take (layers/linear.py, `weight_loader_v2`).
        row_parallel, replicated: linear layers that ranks split by inputs, and do not split.
        latent_inputs, absorbed: of latent attention, the fused module of one input, and the
            projection that is multiplied into others after loading.
        attention, mlp: modules of a block, the first components below it.
        attention_inputs, mlp_inputs: their layers that read the block's hidden state.
        outputs: layers that read what their own module computes.
        latent_norms: norm of a latent -> the layer that reads it.
        producers: layer -> those whose outputs it may read; the first that is there.
    """

    architectures: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()
    norm_offset: float | None = None
    shapes: Mapping[str, tuple[str, ...]] = _usual({})
    renames: Mapping[str, str] = _usual({})
    not_loaded: Mapping[str, str] = _usual({})
    fuses_shared_experts: Callable[[Mapping[str, Any]], bool] = lambda _config: False
    has_biased_router: bool = False
    has_joint_head_norms: bool = False
    dtype_readers: Mapping[str, str] = _usual({})
    unasked: str = ""
    asked_for_weight: Set[str] = frozenset()
    draft_prefixes: tuple[str, ...] = ("mtp.",)  # models/qwen3_next.py:1186
    drafts_with: str = ""
    is_draft: bool = False
    plain: Set[str] = frozenset()
    embeddings: Set[str] = _usual({
        "embed_tokens", "wte", "wpe", "word_embeddings", "embed_in", "tok_embeddings",
        "position_embedding",
    })  # fmt: skip
    lm_heads: Set[str] = _usual({"lm_head", "embed_out"})
    routers: str = r"(?:^|\.)(?:(?:gate|\w*router)(?:\.\w+)*|shared_expert_gate)$"
    experts: str = r"\.experts(?:\.\d+)?(?:\.|$)|\.block_sparse_moe\.(?:in|out)put_linear$"
    float32: str = (
        r"(?:^|\.)(?:A_log|D|dt_bias|sinks|attn_sink|hc_\w+|balancing_biases|"
        r"\w*(?:expert|correction|router)_bias|(?:linear_attn|mamba|mixer|self_attn|"
        r"attention)\.(?:[og]_)?norm\.weight)$"
    )
    computed: Set[str] = _usual({"rotary_emb"})
    expert_shards: Mapping[str, str] = _usual({
        "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2", "w1": "w1", "w3": "w3", "w2": "w2",
    })  # fmt: skip
    parts: tuple[str, ...] = PARTS
    fused_modules: Mapping[str, Mapping[str, str | int | tuple[int, ...]]] = _usual({
        "qkv_proj": {"q_proj": "q", "k_proj": "k", "v_proj": "v"},
        "gate_up_proj": {"gate_proj": 0, "up_proj": 1},
        "fused_qkv_a_proj_with_mqa": {"q_a_proj": 0, "kv_a_proj_with_mqa": 1},
        # models/qwen3_5.py:2491
        "in_proj_qkvz": {"in_proj_qkv": (0, 1, 2), "in_proj_z": 3},
        "in_proj_ba": {"in_proj_b": 0, "in_proj_a": 1},
    })  # fmt: skip
    row_parallel: Set[str] = _usual({
        "o_proj", "down_proj", "out_proj", "dense_4h_to_h", "wo", "w2", "c_proj", "fc2",
    })  # fmt: skip
    replicated: Set[str] = _usual({"q_a_proj", "kv_a_proj_with_mqa"})
    latent_inputs: str = "fused_qkv_a_proj_with_mqa"
    absorbed: str = "kv_b_proj"
    attention: Set[str] = _usual({"self_attn", "attention", "attn", "linear_attn"})
    mlp: Set[str] = _usual({"mlp", "block_sparse_moe", "feed_forward", "moe"})
    attention_inputs: Set[str] = _usual({
        "q_proj", "k_proj", "v_proj", "qkv_proj", "q_a_proj", "kv_a_proj_with_mqa", "in_proj_qkvz",
        "in_proj_ba", "in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "W_pack",
        "query_key_value",
    })  # fmt: skip
    mlp_inputs: Set[str] = _usual({
        "gate_proj", "up_proj", "gate_up_proj", "w1", "w3", "gate", "router", "shared_expert_gate",
        "fc1", "c_fc",
    })  # fmt: skip
    outputs: Set[str] = _usual({
        "o_proj", "out_proj", "dense", "wo", "down_proj", "w2", "fc2", "c_proj",
    })  # fmt: skip
    latent_norms: Mapping[str, str] = _usual({
        "q_a_layernorm": "q_b_proj", "kv_a_layernorm": "kv_b_proj",
    })  # fmt: skip
    producers: Mapping[str, tuple[str, ...]] = _usual({
        "o_proj": _VALUES, "out_proj": _VALUES, "dense": _VALUES, "wo": _VALUES,
        "down_proj": ("up_proj", "gate_up_proj"), "w2": ("w3", "w1"), "fc2": ("fc1",),
        "c_proj": ("c_fc", "v_proj"),
    })  # fmt: skip

    @property
    def is_known(self) -> bool:
        """Whether it is in the table, so that it has the parts that it should have."""
        return self.norm_offset is not None
