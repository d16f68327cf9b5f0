"""Matmuls of quantized activations with quantized weights, as SGLang's CUDA kernels compute them.

Of blocks: FP8 or INT8 codes with a scale a token and K-block and one a weight block. Everything is
a sum over K-blocks of ((codes . weight) * scale) * weight_scale in float32, rounded once, as in
SGLang's Triton kernels `_w8a8_block_fp8_matmul` and `_w8a8_block_int8_matmul`.

Of channels: FP8 or INT8 codes with a scale a token and one a channel. The products of FP8 codes are
added in blocks along K, one block after the other: the sum of two halves of K, the second added to
the first, has the bits of the whole. Those of INT8 codes are summed exactly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from mixedprec_plugin.quantize.scaled import E4M3_UNIT, e4m3_halves

# Chunks that keep the float32 copies in a core's cache; measured by benchmarks/cpu_linear.py.
_TOKENS = 256
_ROWS = 256
# Up to here all K-blocks go into one batched matmul: fewer calls; above, it would miss the cache.
_FEW_TOKENS_OF_BLOCKS = 64
# What is added at once along K. torch adds longer rows in an order that depends on their length.
_BLOCK = 128
# Products of codes in -127..127 whose sum is below 2**24.
_EXACT_INT8 = 1024
# Up to here float32 is faster even where the CPU multiplies bfloat16.
_FEW_TOKENS_OF_CHANNELS = 16


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
    left = e4m3_halves(codes).float()
    scales = scales * E4M3_UNIT**2
    add = _add_batched if codes.shape[0] <= _FEW_TOKENS_OF_BLOCKS else _add_looped
    with exact_in_bfloat16(enabled=add is _add_looped):
        for rows in _blocks(weight.shape[0], _ROWS):
            right = e4m3_halves(weight[rows]).float()
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


def channel_matmul(
    codes: torch.Tensor,
    scales: torch.Tensor,
    weight: torch.Tensor,
    channel_scales: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply quantized activations by a weight with a scale a channel.

    Args:
        codes: [T, K], float8_e4m3fn or int8.
        scales: float32, [T, 1] or one element.
        weight: [N, K], the dtype of codes.
        channel_scales: float32 [N, 1].
    Returns:
        [T, N], computed in float32 and rounded once to dtype; see `scale_sums`.
    """
    total = torch.zeros(codes.shape[0], weight.shape[0], dtype=torch.float32)
    add_products(codes, weight, total)
    return scale_sums(total, codes.dtype, scales, channel_scales).to(dtype)


def add_products(codes: torch.Tensor, weight: torch.Tensor, total: torch.Tensor) -> None:
    """Add codes . weight to a sum; of FP8 in units of E4M3_UNIT**2.

    Args:
        codes: [T, K], float8_e4m3fn or int8.
        weight: [N, K], the dtype of codes.
        total: float32 [T, N], added to in place.
    """
    if codes.dtype == torch.int8:
        _add_int8_products(codes, weight, total)
        return
    left = torch.split(e4m3_halves(codes).float(), _BLOCK, dim=1)
    with exact_in_bfloat16(enabled=codes.shape[0] > _FEW_TOKENS_OF_CHANNELS):
        for rows in _blocks(weight.shape[0], _ROWS):
            right = torch.split(e4m3_halves(weight[rows]).float(), _BLOCK, dim=1)
            for tokens, channels in zip(left, right, strict=True):
                total[:, rows].addmm_(tokens, channels.t())


def _add_int8_products(codes: torch.Tensor, weight: torch.Tensor, total: torch.Tensor) -> None:
    """Add to [T, N]. Sums of up to _EXACT_INT8 products are exact in float32."""
    if torch.cpu._is_vnni_supported():
        total += torch._int_mm(codes, weight.t())
        return
    for rows in _blocks(weight.shape[0], _ROWS):
        for block in _blocks(codes.shape[1], _EXACT_INT8):
            total[:, rows] += codes[:, block].float() @ weight[rows, block].float().t()


def scale_sums(
    total: torch.Tensor,
    codes_dtype: torch.dtype,
    scales: torch.Tensor,
    channel_scales: torch.Tensor,
) -> torch.Tensor:
    """Turn sums of `add_products` into the product, in place.

    Args:
        total: float32 [T, N].
        scales: float32, [T, 1] or one element.
        channel_scales: float32 [N, 1].
    Returns:
        total; of FP8 channel_scale * (scale * sum), of INT8 (channel_scale * scale) * sum.
    Source:
        SGLang's triton_scaled_mm and CUTLASS's fp8_scaled_mm; `fused_moe_kernel`
        (kernels/ops/moe/fused_moe_triton_kernels.py:625) and CUTLASS's int8_scaled_mm, which on
        compute capability 9.0 multiplies by one scale after the other.
    """
    if codes_dtype == torch.int8:
        return total.mul_(scales * channel_scales.t())
    # The unit is a power of two: this rounds as without.
    return total.mul_(scales * E4M3_UNIT**2).mul_(channel_scales.t())


@contextlib.contextmanager
def exact_in_bfloat16(enabled: bool) -> Iterator[None]:
    """Let float32 matmuls inside multiply in bfloat16 and accumulate in float32.

    The operands must be exact in bfloat16, as e4m3 and int8 codes are: then it is only faster,
    four times with AMX. It does nothing on a CPU without bfloat16 instructions. The switch is
    torch's and global to the process; SGLang computes in one thread.
    """
    if not enabled:
        yield
        return
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
