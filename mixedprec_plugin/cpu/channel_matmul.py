"""The matmul of FP8 with one scale a token and one a channel."""

from __future__ import annotations

import torch

from mixedprec_plugin.cpu.e4m3 import E4M3_UNIT, decode_e4m3
from mixedprec_plugin.cpu.precision import exact_in_bfloat16

# Rows of weight whose float32 copy stays in a core's cache; measured by benchmarks/cpu_linear.py.
_ROWS = 256
# Up to here float32 is faster even where the CPU multiplies bfloat16.
_FEW_TOKENS = 16


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
    left = decode_e4m3(codes).float()
    # Both factors are decoded in units of a power of two, so that this rounds as without.
    scales = scales * E4M3_UNIT**2
    out = torch.empty(codes.shape[0], weight.shape[0], dtype=dtype)
    with exact_in_bfloat16(enabled=codes.shape[0] > _FEW_TOKENS):
        for start in range(0, weight.shape[0], _ROWS):
            rows = slice(start, start + _ROWS)
            dot = left @ decode_e4m3(weight[rows]).float().t()
            out[:, rows] = dot.mul_(scales).mul_(channel_scales[rows].t())
    return out
