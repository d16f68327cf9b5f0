"""Weights that are packed in memory and multiplied in the activation's dtype: AWQ and GPTQ."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from mixedprec_plugin.quantize.packing import unpack, unpack_awq


def dequantize_awq(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor
) -> torch.Tensor:
    """The weight that AWQ's kernels multiply by.

    Args:
        qweight: int32 [K, N/8].
        qzeros: int32 [K/G, N/8].
        scales: [K/G, N], the dtype of the activations.
    Returns:
        [N, K]: (q - zero) * scale in the dtype of scales; the difference is exact, the product
        rounded once.
    Source:
        sglang/kernels/ops/quantization/awq_triton.py, awq_dequantize_kernel.
    """
    codes, zeros = unpack_awq(qweight).to(scales.dtype), unpack_awq(qzeros).to(scales.dtype)
    steps = codes.view(*zeros.shape, -1).sub_(zeros.unsqueeze(2))
    return steps.mul_(scales.t().unsqueeze(2)).flatten(1)


def dequantize_gptq(
    qweight: torch.Tensor, scales: torch.Tensor, bits: int, groups: torch.Tensor | None
) -> torch.Tensor:
    """The weight that Marlin multiplies by: symmetric GPTQ, zero points are not read.

    Args:
        qweight: int32 [K/(32/bits), N].
        scales: [K/G, N], the dtype of the activations.
        bits: 4 or 8.
        groups: int32 [K], the group of every row (`g_idx`); None where groups are runs of rows.
    Returns:
        [N, K]: (q - 2**(bits-1)) * scale in the dtype of scales, rounded once.
    Source:
        GPTQMarlinConfig.TYPE_MAP: uint4b8 and uint8b128, a fixed zero point.
    """
    steps = unpack(qweight.t(), bits).to(scales.dtype).sub_(2 ** (bits - 1))
    if groups is not None:
        return steps.mul_(scales[groups].t())
    grouped = steps.view(steps.shape[0], scales.shape[0], -1)
    return grouped.mul_(scales.t().unsqueeze(2)).flatten(1)


def matmul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Multiply in the weight's dtype, accumulating in float32; the bias is added afterwards.

    Args:
        x: [..., K], the dtype of the weight.
        weight: [N, K].
        bias: [N] or None.
    Returns:
        [..., N] in the dtype of x.
    """
    out = linear(x, weight)
    return out if bias is None else out + bias
