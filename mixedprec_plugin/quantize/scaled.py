"""Dequantize 8-bit codes beside a scale, whoever wrote them: W = (q - zero) * scale.

Reads what compressed-tensors (int-, float- and naive-quantized), gptqmodel (whose scales are
reciprocals: W = q / scale) and torchao (plain codes) store.
Source: compressed-tensors `dequantize`, gptqmodel's `weight_scale_semantics`, torchao
`Float8Tensor.dequantize` and `IntxUnpackedToInt8Tensor.dequantize`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mixedprec_plugin.methods.fp8.codec import E4M3, decode
from mixedprec_plugin.quantize.checks import refuse, take
from mixedprec_plugin.quantize.chunks import row_chunks


def dequantize(tensors: Mapping[str, torch.Tensor], arguments: Mapping[str, Any]) -> torch.Tensor:
    """Dequantize codes with a scale for each [block_n, block_k] tile.

    Args:
        tensors: parameter suffix -> tensor; not modified.
        arguments: "codes", "scale" and "zero_point", suffixes of the codes [N, K] (one byte each),
            of the scales (ceil(N/bn) x ceil(K/bk) of them in any shape, any floating dtype) and of
            the zero points (as many integers; may be missing); "block", [bn, bk], [1, K] for
            channels and [N, K] for the whole tensor; "reciprocal", whether scales divide.
    Returns:
        float32 [N, K], rounded once.
    Raises:
        ShapeError: the codes are no matrix of bytes, or the scales or zeros are missing or another
            number of them.
    """
    codes = tensors[arguments["codes"]]
    if codes.dim() != 2 or codes.element_size() != 1:
        refuse(
            arguments["codes"],
            f"{codes.dtype} {list(codes.shape)} (expected one byte an element, [N, K])",
            "check quantization_config against the checkpoint",
            "tensor-dtype",
        )
    N, K = codes.shape
    block_n, block_k = arguments["block"]
    grid = (-(-N // block_n), -(-K // block_k))
    scales = _grid(tensors, arguments["scale"], grid)
    zeros = None
    if arguments["zero_point"] in tensors:
        zeros = _grid(tensors, arguments["zero_point"], grid)
    weight = torch.empty((N, K), device=codes.device)
    for rows in row_chunks(N, K):
        chunk = weight[rows]
        if codes.dtype == E4M3:
            decode(codes[rows], chunk)
        else:
            chunk.copy_(codes[rows])
        if zeros is not None:
            chunk.sub_(_spread(zeros, rows, (block_n, block_k), K))
        spread = _spread(scales, rows, (block_n, block_k), K)
        if arguments["reciprocal"]:
            chunk.div_(spread)
        else:
            chunk.mul_(spread)
    return weight


def _grid(tensors: Mapping[str, torch.Tensor], suffix: str, grid: tuple[int, int]) -> torch.Tensor:
    """Return one float32 a tile, [ceil(N/bn), ceil(K/bk)]."""
    tensor = tensors.get(suffix)
    if tensor is not None and tensor.numel() == grid[0] * grid[1] and 1 in grid:
        return tensor.float().reshape(grid)
    return take(tensors, suffix, grid).float()


def _spread(grid: torch.Tensor, rows: slice, block: tuple[int, int], K: int) -> torch.Tensor:
    """Repeat the tiles' values over the elements of some rows: [rows, K] or [rows, 1]."""
    tiles = torch.arange(rows.start, rows.stop, device=grid.device) // block[0]
    chosen = grid[tiles]
    if grid.shape[1] == 1:
        return chosen
    return chosen.repeat_interleave(block[1], dim=1)[:, :K]
