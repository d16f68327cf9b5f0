"""Linear layers that a checkpoint stores fused, as Phi-3 does: the sizes of their shards.

SGLang splits them by its own sizes when it loads them (`_load_fused_module_from_checkpoint`,
layers/linear.py:897, 1197), so that shape rules hold for each shard.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mixedprec_plugin.checkpoint.config import text_config
from mixedprec_plugin.plan.architecture import last_component
from mixedprec_plugin.plan.model import PlannedLayer


def stored_shards(layer: PlannedLayer, config: Mapping[str, Any]) -> tuple[tuple[str, int], ...]:
    """Return (shard id, output features) of a layer that is stored fused; empty if it is not.

    Args:
        config: the model's config.json.
    """
    if layer.kind != "linear" or layer.shard is not None or layer.stored is None:
        return ()
    last, N = last_component(layer.name), layer.stored.N
    if last == "gate_up_proj":
        return (("gate", N // 2), ("up", N // 2))
    if last == "qkv":  # of vision towers, whose heads are all alike
        return (("q", N // 3), ("k", N // 3), ("v", N // 3))
    if last != "qkv_proj":
        return ()
    said = text_config(config)
    num_heads = int(said.get("num_attention_heads") or 0)
    num_kv_heads = int(said.get("num_key_value_heads") or num_heads)
    head = int(said.get("head_dim") or (said.get("hidden_size", 0) // max(num_heads, 1)))
    return (("q", num_heads * head), ("k", num_kv_heads * head), ("v", num_kv_heads * head))


def why_not_stored_fused(layer: PlannedLayer, config: Mapping[str, Any]) -> str:
    """Return why a layer that is stored fused cannot be split; empty if it can, or is not."""
    shards = stored_shards(layer, config)
    if not shards or layer.stored is None:
        return ""
    expected = sum(size for _, size in shards)
    if expected == layer.stored.N:
        return ""
    parts = " + ".join(str(size) for _, size in shards)
    return (
        f"is stored fused with {layer.stored.N} rows (expected {parts} = {expected} for "
        f"{', '.join(name for name, _ in shards)} by config.json)"
    )
