"""The block matmul of FP8 and INT8: one scale a token and K-block, one a weight block.

Everything is a sum over K-blocks of ((codes . weight) * scale) * weight_scale in float32, rounded
once, as SGLang's Triton kernels `_w8a8_block_fp8_matmul` and `_w8a8_block_int8_matmul` compute it.
"""

from __future__ import annotations

import torch

from mixedprec_plugin.cpu.e4m3 import E4M3_UNIT, decode_e4m3
from mixedprec_plugin.cpu.precision import exact_in_bfloat16

# Chunks that keep the float32 copies in a core's cache; measured by benchmarks/cpu_linear.py.
_TOKENS = 256
_ROWS = 256
# Up to here all K-blocks go into one batched matmul: fewer calls; above, it would miss the cache.
_FEW_TOKENS = 64


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
        [T, N] in dtype.
    """
    total = torch.zeros(codes.shape[0], weight.shape[0], dtype=torch.float32)
    add_blocks(codes, scales, weight, weight_scales, block_size, total)
    return total.to(dtype)


def add_blocks(
    codes: torch.Tensor,
    scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    block_size: tuple[int, int],
    total: torch.Tensor,
) -> None:
    """Add the product to a sum, one K-block after the other.

    Args:
        codes, scales, weight, weight_scales, block_size: as of `block_matmul`.
        total: float32 [T, N], added to in place.
    """
    add = _add_int8 if codes.dtype == torch.int8 else _add_fp8
    row_scales = weight_scales.repeat_interleave(block_size[0], dim=0)[: weight.shape[0]]
    row_scales = row_scales.t().contiguous()
    for tokens in _blocks(codes.shape[0], _TOKENS):
        add(codes[tokens], scales[tokens], weight, row_scales, total[tokens])


def _add_int8(
    codes: torch.Tensor,
    scales: torch.Tensor,
    weight: torch.Tensor,
    row_scales: torch.Tensor,
    total: torch.Tensor,
) -> None:
    """Add to [T, N]; row_scales [K/BK, N]. A sum of 128 products of int8 is exact."""
    block_k = codes.shape[1] // scales.shape[1]
    # Without VNNI `_int_mm` is a plain loop, and float32 is faster and as exact.
    use_int8 = torch.cpu._is_vnni_supported()
    for index, block in enumerate(_blocks(codes.shape[1], block_k)):
        left, right = codes[:, block], weight[:, block].t()
        dot = torch._int_mm(left, right).float() if use_int8 else left.float() @ right.float()
        total += dot.mul_(scales[:, index : index + 1]).mul_(row_scales[index])


def _add_fp8(
    codes: torch.Tensor,
    scales: torch.Tensor,
    weight: torch.Tensor,
    row_scales: torch.Tensor,
    total: torch.Tensor,
) -> None:
    """Add to [T, N]; row_scales [K/BK, N]. The decoded codes' unit is a power of two."""
    left = decode_e4m3(codes).float()
    scales = scales * E4M3_UNIT**2
    add = _add_batched if codes.shape[0] <= _FEW_TOKENS else _add_looped
    with exact_in_bfloat16(enabled=add is _add_looped):
        for rows in _blocks(weight.shape[0], _ROWS):
            right = decode_e4m3(weight[rows]).float()
            add(left, scales, right, row_scales[:, rows], total[:, rows])


def _add_batched(
    left: torch.Tensor,
    scales: torch.Tensor,
    right: torch.Tensor,
    row_scales: torch.Tensor,
    total: torch.Tensor,
) -> None:
    """Add [T, K] x [n, K] to [T, n], all K-blocks multiplied at once."""
    num_blocks = scales.shape[1]
    lefts = left.view(left.shape[0], num_blocks, -1).transpose(0, 1)
    rights = right.view(right.shape[0], num_blocks, -1).permute(1, 2, 0)
    dots = torch.bmm(lefts, rights)
    # not sum(0), whose order depends on how many blocks there are
    for dot in dots.mul_(scales.t().unsqueeze(2)).mul_(row_scales.unsqueeze(1)):
        total += dot


def _add_looped(
    left: torch.Tensor,
    scales: torch.Tensor,
    right: torch.Tensor,
    row_scales: torch.Tensor,
    total: torch.Tensor,
) -> None:
    """Add [T, K] x [n, K] to [T, n], one K-block after the other."""
    for index, block in enumerate(_blocks(left.shape[1], left.shape[1] // scales.shape[1])):
        dot = left[:, block] @ right[:, block].t()
        total += dot.mul_(scales[:, index : index + 1]).mul_(row_scales[index])


def _blocks(size: int, block_size: int) -> list[slice]:
    """Slices of block_size that cover size; the last may be shorter."""
    return [slice(start, start + block_size) for start in range(0, size, block_size)]
