"""Weights of few bits multiplied in the activation's dtype: what AWQ's and Marlin's kernels do."""

from __future__ import annotations

import torch
from torch.nn.functional import linear


def dequantize(
    codes: torch.Tensor, zeros: torch.Tensor | int, scales: torch.Tensor
) -> torch.Tensor:
    """The weight that the kernels multiply by.

    Args:
        codes: uint8 or int8 [N, K].
        zeros: zero points, uint8 [N, K/G], or one for all.
        scales: [K/G, N], the dtype of the activations.
    Returns:
        [N, K]: (code - zero) * scale in the dtype of scales; the difference is exact, the product
        rounded once.
    Source:
        sglang/kernels/ops/quantization/awq_triton.py, awq_dequantize_kernel; for GPTQ the types
        uint4b8 and uint8b128 of GPTQMarlinConfig.TYPE_MAP.
    """
    num_groups, num_rows = scales.shape
    steps = codes.to(scales.dtype).view(num_rows, num_groups, -1)
    if isinstance(zeros, torch.Tensor):
        steps.sub_(zeros.to(scales.dtype).unsqueeze(2))
    elif zeros:
        steps.sub_(zeros)
    return steps.mul_(scales.t().unsqueeze(2)).view(num_rows, -1)


def multiply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply in the weight's dtype, accumulating in float32.

    Args:
        x: [T, K], the dtype of the weight.
        weight: [N, K].
    Returns:
        [T, N] in the dtype of x.
    """
    # Without AVX-512 torch multiplies 16-bit matrices one by one; float32 gives the same sums.
    if x.shape[0] > 1 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return linear(x.float(), weight.float()).to(x.dtype)
    return linear(x, weight)
