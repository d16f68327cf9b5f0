"""The matmul of FP8 with one scale a token and one a channel.

The codes' products are added in blocks along K, one block after the other: the sum of two halves of
K, the second added to the first, has the bits of the whole.
"""

from __future__ import annotations

import torch

from mixedprec_plugin.cpu.e4m3 import E4M3_UNIT, decode_e4m3
from mixedprec_plugin.cpu.precision import exact_in_bfloat16

# Rows of weight whose float32 copy stays in a core's cache; measured by benchmarks/cpu_linear.py.
_ROWS = 256
# What is added at once along K. torch adds longer rows in an order that depends on their length.
_BLOCK = 128
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
    total = torch.zeros(codes.shape[0], weight.shape[0], dtype=torch.float32)
    add_products(codes, weight, total)
    return scale_sums(total, scales, channel_scales).to(dtype)


def add_products(codes: torch.Tensor, weight: torch.Tensor, total: torch.Tensor) -> None:
    """Add codes . weight, in units of E4M3_UNIT**2, to a sum.

    Args:
        codes: float8_e4m3fn [T, K].
        weight: float8_e4m3fn [N, K].
        total: float32 [T, N], added to in place.
    """
    left = torch.split(decode_e4m3(codes).float(), _BLOCK, dim=1)
    with exact_in_bfloat16(enabled=codes.shape[0] > _FEW_TOKENS):
        for start in range(0, weight.shape[0], _ROWS):
            rows = slice(start, start + _ROWS)
            right = torch.split(decode_e4m3(weight[rows]).float(), _BLOCK, dim=1)
            for tokens, channels in zip(left, right, strict=True):
                total[:, rows].addmm_(tokens, channels.t())


def scale_sums(
    total: torch.Tensor, scales: torch.Tensor, channel_scales: torch.Tensor
) -> torch.Tensor:
    """Turn sums of `add_products` into the product, in place.

    Args:
        total: float32 [T, N].
        scales: float32, [T, 1] or one element.
        channel_scales: float32 [N, 1].
    Returns:
        total.
    """
    # The unit is a power of two: this rounds as without.
    return total.mul_(scales * E4M3_UNIT**2).mul_(channel_scales.t())
