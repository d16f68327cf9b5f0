"""Weights of 4 bits in the layout of torch's kernel, dequantized by a compiled loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mixedprec_plugin.quantize.loops import compiled, inlined, over_rows

Array = Any


def widen_int4(
    packed: torch.Tensor,
    zeros: torch.Tensor | int,
    scales: torch.Tensor,
    rows: int,
    made: torch.Tensor,
) -> torch.Tensor:
    """Make the weight that `cpu.packed.dequantize` makes, to the bit.

    Args:
        packed: uint8 [N, K/2], blocks of so many rows; see `cpu.packed`.
        zeros: zero points, uint8 [N, K/G], or one for all.
        scales: bfloat16 [K/G, N].
        rows: of a block, 64 or 32.
        made: bfloat16 [K, N], filled.
    Returns:
        bfloat16 [N, K], a view of `made`.
    """
    N, K = packed.shape[0], packed.shape[1] * 2
    if isinstance(zeros, torch.Tensor):
        zero = zeros.t().float().contiguous()
    else:
        zero = torch.full(scales.shape, float(zeros))
    blocks = packed.view(N // rows, K, rows // 2).numpy()
    bits = made.view(torch.int16).numpy()
    scale = scales.float().contiguous()
    over_rows(_widen, N // rows, blocks, zero.numpy(), scale.numpy(), bits)
    return made.t()


@inlined
def _rounded(value: Any) -> Any:
    """Bits of the nearest bfloat16, ties to even."""
    bits = np.float32(value).view(np.int32)
    odd = np.int32(np.int32(bits >> 16) & np.int32(1))
    return np.int16(np.int32(bits + np.int32(0x7FFF) + odd) >> 16)


@compiled
def _widen(blocks: Array, zeros: Array, scales: Array, made: Array, start: int, stop: int) -> None:
    """Fill bits [K, N] from uint8 [blocks, K, rows / 2], for some blocks."""
    K, half = blocks.shape[1:]
    size = K // len(scales)
    for block in range(start, stop):
        first = 2 * block * half
        middle, last = first + half, first + 2 * half
        for group in range(len(scales)):
            zero, scale = zeros[group, first:middle], scales[group, first:middle]
            other, step = zeros[group, middle:last], scales[group, middle:last]
            for k in range(group * size, group * size + size):
                source = blocks[block, k]
                low, high = made[k, first:middle], made[k, middle:last]
                for r in range(len(source)):
                    code = np.float32(np.int32(source[r] & np.uint8(15)))
                    low[r] = _rounded((code - zero[r]) * scale[r])
                for r in range(len(source)):
                    code = np.float32(np.int32(source[r] >> np.uint8(4)))
                    high[r] = _rounded((code - other[r]) * step[r])
