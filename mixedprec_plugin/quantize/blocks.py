"""One scale for each [block_n, block_k] tile of a weight: W = q * scale_inv.

The grid of scales is ceil(N / block_n) x ceil(K / block_k); tiles at the lower and right edges may
be ragged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from mixedprec_plugin.quantize.checks import require_finite, take, take_matrix, weight_shape
from mixedprec_plugin.quantize.chunks import block_chunks, float_block_chunks

# Below the smallest normal number a quotient would lose the half-a-step bound, or divide by zero.
SMALLEST_SCALE = torch.finfo(torch.float32).smallest_normal


def grid_shape(N: int, K: int, block: tuple[int, int]) -> tuple[int, int]:
    """Return the shape of the grid of scales for an [N, K] weight."""
    return -(-N // block[0]), -(-K // block[1])


def quantize_blocks(
    weight: torch.Tensor,
    block: tuple[int, int],
    largest: float,
    encode: Callable[[torch.Tensor, torch.Tensor], object],
    code_dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """Scale every tile of a weight so that its largest magnitude becomes `largest`, and encode it.

    Args:
        weight: [N, K], floating point; not modified.
        block: (block_n, block_k).
        largest: the largest magnitude that a code can stand for.
        encode: writes a scaled float32 chunk, which it may overwrite, to a chunk of codes.
        code_dtype: dtype of the codes.
    Returns:
        "weight" [N, K] of `code_dtype`, "weight_scale_inv" float32 [ceil(N/bn), ceil(K/bk)],
        weight ~= q * scale_inv. No clamping is needed: scale_inv is the tile's largest magnitude
        over `largest` to half a unit in the last place, so that no quotient rounds past `largest`.
    Raises:
        ShapeError: not a matrix of floats, or not finite.
    """
    N, K = weight_shape(weight)
    block_n, block_k = block
    rows_of_blocks, columns_of_blocks = grid_shape(N, K, block)
    codes = torch.empty((N, K), dtype=code_dtype, device=weight.device)
    scales = torch.empty((rows_of_blocks, columns_of_blocks), device=weight.device)
    for rows, columns, values in float_block_chunks(weight, block_n, block_k):
        tops = torch.maximum(values.amax(0), -values.amin(0))
        ragged = -len(tops) % block_k
        tops = torch.nn.functional.pad(tops, (0, ragged)).view(-1, block_k).amax(1)
        scale = (tops / largest).clamp_(min=SMALLEST_SCALE)
        first = columns.start // block_k
        scales[rows.start // block_n, first : first + len(scale)] = scale
        spread = scale.repeat_interleave(block_k)[: values.shape[1]]
        encode(values.div_(spread), codes[rows, columns])
    require_finite(scales, weight)
    return {"weight": codes, "weight_scale_inv": scales}


def dequantize_blocks(
    tensors: Mapping[str, torch.Tensor],
    block: tuple[int, int],
    decode: Callable[[torch.Tensor, torch.Tensor], object],
    code_dtype: torch.dtype,
) -> torch.Tensor:
    """Undo `quantize_blocks`.

    Args:
        tensors: "weight" [N, K] of `code_dtype`, "weight_scale_inv" [ceil(N/bn), ceil(K/bk)] of any
            floating dtype; not modified.
        block: (block_n, block_k).
        decode: writes a chunk of codes to a float32 chunk.
        code_dtype: dtype that the codes must have.
    Returns:
        float32 [N, K], q * scale_inv rounded once.
    Raises:
        ShapeError: a tensor is missing, or of another shape or dtype.
    """
    codes = take_matrix(tensors, "weight", code_dtype, "[N, K]")
    N, K = codes.shape
    block_n, block_k = block
    scales = take(tensors, "weight_scale_inv", grid_shape(N, K, block)).float()
    weight = torch.empty((N, K), device=codes.device)
    for rows, columns in block_chunks(N, K, block_n, block_k):
        first, last = columns.start // block_k, -(-columns.stop // block_k)
        spread = scales[rows.start // block_n, first:last].repeat_interleave(block_k)
        chunk = weight[rows, columns]
        decode(codes[rows, columns], chunk)
        chunk.mul_(spread[: columns.stop - columns.start])
    return weight
