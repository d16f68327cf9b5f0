"""The matmul of FP8 with one scale a token and one a channel."""

from __future__ import annotations

import torch

from mixedprec_plugin.cpu.e4m3 import decode_e4m3


def channel_matmul(
    codes: torch.Tensor,
    scales: torch.Tensor,
    weight: torch.Tensor,
    channel_scales: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply quantized activations by a weight with a scale a channel.

    Args:
        codes: float8_e4m3fn [T, K].
        scales: float32, [T, 1] or one element.
        weight: float8_e4m3fn [N, K].
        channel_scales: float32 [N, 1].
        dtype: dtype of the result.
    Returns:
        [T, N]: channel_scale * (scale * (codes . weight)) in float32, rounded once to dtype.
    Source:
        SGLang's triton_scaled_mm and CUTLASS's fp8_scaled_mm.
    """
    total = decode_e4m3(codes) @ decode_e4m3(weight).t()
    return total.mul_(scales).mul_(channel_scales.view(1, -1)).to(dtype)
