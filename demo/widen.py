"""Widen a Llama checkpoint with zeros so that every dimension is a multiple of 128.

The function stays the same: the added hidden channels carry zeros, the added heads have zero
weights, and RMSNorm's mean over more channels is corrected in its weight and epsilon.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch


def widen_config(config: Mapping[str, Any], hidden_size: int, num_kv_heads: int) -> dict[str, Any]:
    """Return config.json for the widened shape; query heads a key-value head stay as they are."""
    heads_per_kv = config["num_attention_heads"] // config["num_key_value_heads"]
    return {
        **config,
        "hidden_size": hidden_size,
        "num_attention_heads": num_kv_heads * heads_per_kv,
        "num_key_value_heads": num_kv_heads,
        "rms_norm_eps": config["rms_norm_eps"] * config["hidden_size"] / hidden_size,
    }


def widen_tensors(
    tensors: Mapping[str, torch.Tensor], narrow: Mapping[str, Any], wide: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Zero-pad weights from the narrow config's shapes to the wide one's.

    Args:
        tensors: name -> tensor of the narrow model; not modified.
        narrow: its config.json.
        wide: the config that `widen_config` returned.
    Returns:
        name -> new tensor of the same dtype. The added channels of a norm weigh as much as 1 did:
        they multiply zeros, and a leak into them shows.
    """
    hidden, head_dim = wide["hidden_size"], narrow["head_dim"]
    query_size = wide["num_attention_heads"] * head_dim
    kv_size = wide["num_key_value_heads"] * head_dim
    shapes = {
        "embed_tokens": (None, hidden),
        "q_proj": (query_size, hidden),
        "k_proj": (kv_size, hidden),
        "v_proj": (kv_size, hidden),
        "o_proj": (hidden, query_size),
        "gate_proj": (None, hidden),
        "up_proj": (None, hidden),
        "down_proj": (hidden, None),
    }
    factor = math.sqrt(narrow["hidden_size"] / hidden)
    widened = {}
    for name, tensor in tensors.items():
        layer = name.split(".")[-2]
        if tensor.ndim == 1:
            ones = tensor.new_ones(hidden - tensor.shape[0])
            scaled = torch.cat([tensor, ones]).double() * factor
            widened[name] = scaled.to(tensor.dtype)
        else:
            rows, columns = shapes[layer]
            widened[name] = _pad(tensor, rows or tensor.shape[0], columns or tensor.shape[1])
    return widened


def _pad(tensor: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    padded = tensor.new_zeros(rows, columns)
    padded[: tensor.shape[0], : tensor.shape[1]] = tensor
    return padded
