"""Scales of the KV cache, as checkpoints spell them.

    k_scale, v_scale at the attention            vLLM, compressed-tensors
        in `attn` or `kv_cache` below it         SGLang, and what it saves
        at k_proj, v_proj or qkv_proj            ModelOpt
    kv_scale at the attention, for both          AutoFP8
    output_scale at k_proj and v_proj            Quark, older compressed-tensors

Source: `maybe_remap_kv_scale_name` (sglang/srt/model_loader/weight_utils.py:1779) and vLLM's.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# the tensors that are none of a layer's matrix, and stay as precise as they are stored
KV_SUFFIXES = frozenset({"k_scale", "v_scale", "kv_scale", "output_scale"})
_SCALE = re.compile(
    r"(.+?)(\.attn|\.kv_cache|\.qkv_proj|\.[kv]_proj)?\.(kv?|v)_scale|(.+)\.([kv])_proj\.output_scale"
)


class KvScale(NamedTuple):
    """What a scale of the KV cache belongs to.

    Attributes:
        attentions: names that the attention layer may have.
        parts: `k`, `v` or `kv`.
    """

    attentions: tuple[str, ...]
    parts: str


def kv_scale(name: str) -> KvScale | None:
    """Tell what a tensor's name says of the KV cache; None if it says nothing."""
    match = _SCALE.fullmatch(name)
    if match is None:
        return None
    attention, inner, parts, projected, projection = match.groups()
    if projected:
        return KvScale((projected,), projection)
    # a model may call the attention itself `attn`
    own = (attention + inner,) if inner == ".attn" else ()
    return KvScale((attention, *own), parts)
