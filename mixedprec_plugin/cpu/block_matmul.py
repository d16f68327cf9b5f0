"""The block matmul of FP8 and INT8: one scale a token and K-block, one a weight block."""

from __future__ import annotations

import torch

from mixedprec_plugin.cpu.e4m3 import decode_e4m3


def block_matmul(
    codes: torch.Tensor,
    scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    block_size: tuple[int, int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply quantized activations by a block-quantized weight.

    Args:
        codes: [T, K], float8_e4m3fn or int8.
        scales: float32 [T, K/BK].
        weight: [N, K], the dtype of codes.
        weight_scales: float32 [ceil(N/BN), ceil(K/BK)]; W = weight * scale.
        block_size: (BN, BK). N may be ragged; K is a multiple of BK.
        dtype: dtype of the result.
    Returns:
        [T, N]: the sum over K-blocks of ((codes . weight) * scale) * weight_scale in float32,
        rounded once to dtype.
    Source:
        SGLang's Triton kernels _w8a8_block_fp8_matmul and _w8a8_block_int8_matmul. Products of two
        e4m3 or two int8 numbers are exact in float32; so are sums of 128 products of int8.
    """
    block_n, block_k = block_size
    num_rows = weight.shape[0]
    row_scales = weight_scales.repeat_interleave(block_n, dim=0)[:num_rows].t().contiguous()
    left, right = _as_float(codes), _as_float(weight)
    total = torch.zeros(codes.shape[0], num_rows)
    for index, start in enumerate(range(0, codes.shape[1], block_k)):
        block = slice(start, start + block_k)
        partial = left[:, block] @ right[:, block].t()
        total += partial.mul_(scales[:, index : index + 1]).mul_(row_scales[index])
    return total.to(dtype)


def _as_float(codes: torch.Tensor) -> torch.Tensor:
    """Codes as float32, exact."""
    return codes.float() if codes.dtype == torch.int8 else decode_e4m3(codes)
