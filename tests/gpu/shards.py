"""What stock SGLang makes of FP8 shards that each have one scale, for the reference."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.activations import FP8_MAX, QuantizedInputLinear

_FUSED = (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj")))


def share_scales(model: Any) -> int:
    """Give the shards of each fused module the greatest of their scales, in place.

    A server with a preset keeps each shard's own scale; compressed-tensors' method in SGLang does
    not. Source: SGLang's `requantize_with_max_scale` (layers/quantization/utils.py:164), which
    dequantizes to float16.

    Returns:
        how many modules were changed.
    """
    num_changed = 0
    for layer in model.model.layers:
        for block, names in _FUSED:
            shards = [getattr(getattr(layer, block), name) for name in names]
            if not all(_has_one_scale(shard) for shard in shards):
                continue
            greatest = torch.stack([shard.get_buffer("scales")[0, 0] for shard in shards]).max()
            for shard in shards:
                codes, scales = shard.get_buffer("codes"), shard.get_buffer("scales")
                weight = (codes.half() * scales[:1].half()).float()
                again = (weight * (1 / greatest)).clamp(-FP8_MAX, FP8_MAX)
                shard.codes = again.to(torch.float8_e4m3fn).float()
                shard.scales = torch.full_like(scales, float(greatest))
            num_changed += 1
    return num_changed


def _has_one_scale(shard: torch.nn.Module) -> bool:
    if not isinstance(shard, QuantizedInputLinear):
        return False
    scales = shard.get_buffer("scales")
    return scales.shape[1] == 1 and bool((scales == scales[0, 0]).all())
