"""Stored shapes, held against config.json."""

from __future__ import annotations

from collections.abc import Sequence

from mixedprec_plugin.checkpoint.source import Source
from mixedprec_plugin.errors import Problem
from mixedprec_plugin.plan.architecture import last_component
from mixedprec_plugin.plan.folding import fold_names
from mixedprec_plugin.plan.model import PlannedLayer

# architectures whose linear layers have the shapes that config.json spells out
_PLAIN_DECODERS = frozenset(
    {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
)


def check_config_shapes(layers: Sequence[PlannedLayer], source: Source) -> list[Problem]:
    """Hold stored shapes against config.json, for architectures whose shapes it spells out."""
    config = source.config
    architectures = config.get("architectures") or [""]
    if architectures[0] not in _PLAIN_DECODERS:
        return []
    hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    num_heads = int(config["num_attention_heads"])
    head = int(config.get("head_dim") or hidden // num_heads)
    q, kv = num_heads * head, int(config.get("num_key_value_heads") or num_heads) * head
    expected = {
        "q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden),
        "o_proj": (hidden, q), "gate_proj": (inner, hidden), "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }  # fmt: skip
    vectors = {"input_layernorm", "post_attention_layernorm", "norm"}
    tables = {"embed_tokens", "lm_head"}
    found: dict[tuple[str, tuple[int, ...], tuple[int, ...]], list[str]] = {}
    for layer in layers:
        last = last_component(layer.name)
        weight = layer.inputs.get("weight")
        if last in expected and layer.stored is not None and layer.stored.method:
            got: tuple[int, ...] = (layer.stored.N, layer.stored.K)
            want: tuple[int, ...] = expected[last]
        elif last in vectors and weight is not None:
            got, want = weight.shape, (hidden,)
        elif last in tables and weight is not None:
            got, want = weight.shape, (int(config["vocab_size"]), hidden)
        else:
            continue
        if got != want:
            found.setdefault((last, got, want), []).append(layer.name)
    return [
        Problem(
            ", ".join(fold_names(names)),
            f"its weight is {list(got)} (expected {list(want)} by config.json)",
            "config.json and weights are of different models, or a file is damaged",
            "config-shape",
        )
        for (_, got, want), names in found.items()
    ]
