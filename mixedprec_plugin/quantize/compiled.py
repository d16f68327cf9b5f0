"""Rounding to nearest, compiled for a CPU: what `quantize.scaled` and `.integers` do.

Weights are bfloat16. Scales and zero points are torch's; the least and the largest values that they
are made of, and the codes, have the bits that torch's arithmetic gives them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from mixedprec_plugin.quantize.chunks import row_chunks
from mixedprec_plugin.quantize.loops import compiled, inlined, over_rows
from mixedprec_plugin.quantize.rounding import Grid

Array = Any
# without a float32 copy, so many of torch's chunks are worked on at once
_CHUNKS = 4
# added and taken off again, it leaves a float32 below 2**22 rounded to a whole number, ties to even
_WHOLE = np.float32(1.5 * 2**23)
# bits of float32: e4m3's least normal number; and what its subnormal ones are added to
_LEAST_NORMAL, _TINY_BITS, _SUBNORMAL = np.int32(121 << 23), np.int32(141 << 23), np.float32(2**14)
# moves float32's exponent to e4m3's, and rounds up what is above half a unit
_REBIAS = np.int32(((7 - 127) << 23) + 0x7FFFF)


def ranges(weight: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tell the least and the largest value of each `size` columns of a row; NaN if there is any.

    Args:
        weight: bfloat16 [N, K], contiguous.
    Returns:
        both float32 [N, ceil(K/size)].
    """
    N, K = weight.shape
    low, high = torch.empty(2, N, -(-K // size))
    over_rows(_ranges, N, _bits(weight), size, low.numpy(), high.numpy())
    return low, high


def encode(
    weight: torch.Tensor, scales: torch.Tensor, block: tuple[int, int], codes: torch.Tensor
) -> None:
    """Round to the nearest code, ties to even.

    Args:
        weight: bfloat16 [N, K], contiguous.
        scales: float32 [ceil(N/bn), ceil(K/bk)], as `scaled.quantize_tiles` makes them.
        block: (bn, bk).
        codes: int8 or float8_e4m3fn [N, K], filled.
    """
    arguments = (_bits(weight), scales.numpy(), *block, codes.dtype.is_floating_point)
    over_rows(_encode, len(weight), *arguments, codes.view(torch.uint8).numpy())


def round_rows(
    weight: torch.Tensor, group_size: int, grid: Grid, multiple: int
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Round a weight to a grid of codes, some rows at a time.

    Args:
        weight: bfloat16 [N, K], contiguous.
        group_size: elements along K that share a scale; divides K.
        multiple: as for `row_chunks`.
    Yields:
        The slice of rows, and what `rounding.round_groups` makes of them; the codes are valid until
        the next step.
    """
    (N, K), buffer = weight.shape, torch.empty(0, dtype=torch.uint8)
    factor = _CHUNKS * torch.get_num_threads()
    for rows in row_chunks(N, K, multiple, factor=factor):
        chunk = weight[rows]
        scale, zero = grid.fit(*ranges(chunk, group_size))
        if buffer.numel() < chunk.numel():
            buffer = torch.empty(chunk.numel(), dtype=torch.uint8)
        codes = buffer[: chunk.numel()].view(chunk.shape)
        arguments = (scale.numpy(), zero.numpy(), float(grid.largest_code), codes.numpy())
        over_rows(_integers, len(chunk), _bits(chunk), *arguments)
        yield rows, codes, scale, zero


def _bits(weight: torch.Tensor) -> Array:
    return weight.view(torch.int16).numpy()


@inlined
def _float(bits: Any) -> Any:
    return np.int32(np.int32(bits) << 16).view(np.float32)


@inlined
def _ordered(bits: Any) -> Any:
    """Bits of bfloat16 as integers in the order of the numbers, and back."""
    return np.int16(bits ^ (np.int16(bits >> 15) & np.int16(0x7FFF)))


@inlined
def e4m3_code(magnitude: Any) -> Any:
    """The code of the nearest e4m3 number, ties to even; no magnitude is above the largest.

    Source: torch/headeronly/util/Float8_e4m3fn.h, fp8e4m3fn_from_fp32_value.
    """
    bits = np.float32(magnitude).view(np.int32)
    tiny = np.int32(np.float32(magnitude + _SUBNORMAL).view(np.int32) - _TINY_BITS)
    odd = np.int32(np.int32(bits >> 20) & np.int32(1))
    normal = np.int32(np.int32(bits + _REBIAS + odd) >> 20)
    return tiny if bits < _LEAST_NORMAL else normal


@inlined
def e4m3_value(code: Any) -> Any:
    """The number of an e4m3 code that is not negative; of NaN's 480."""
    normal = np.int32(np.int32(code << 20) + np.int32(120 << 23)).view(np.float32)
    return normal if code >= 8 else np.float32(code) * np.float32(2.0**-9)


@compiled
def _ranges(weight: Array, size: int, low: Array, high: Array, start: int, stop: int) -> None:
    """As `ranges`, for some rows of a weight, int16 [N, K], the bits of bfloat16."""
    for row in range(start, stop):
        for group in range(low.shape[1]):
            least, most = np.int16(0x7FFF), np.int16(-0x8000)
            source = weight[row, group * size : (group + 1) * size]
            for j in range(len(source)):
                key = _ordered(source[j])
                least, most = min(least, key), max(most, key)
            low[row, group] = _float(_ordered(least))
            high[row, group] = _float(_ordered(most))


@compiled
def _encode(
    weight: Array, scales: Array, rows: int, columns: int, is_float: bool, codes: Array,
    start: int, stop: int,
) -> None:  # fmt: skip
    """As `encode`, for some rows; no quotient is above the largest code."""
    for row in range(start, stop):
        for tile in range(scales.shape[1]):
            scale = scales[row // rows, tile]
            source = weight[row, tile * columns : (tile + 1) * columns]
            target = codes[row, tile * columns : (tile + 1) * columns]
            if is_float:
                for j in range(len(source)):
                    scaled = np.float32(_float(source[j]) / scale)
                    sign = np.int32(np.int32(scaled.view(np.int32) >> 24) & np.int32(0x80))
                    target[j] = np.uint8(e4m3_code(np.float32(abs(scaled))) | sign)
            else:
                for j in range(len(source)):
                    code = (_float(source[j]) / scale + _WHOLE) - _WHOLE
                    target[j] = np.uint8(np.int32(code))


@compiled
def _integers(
    weight: Array, scales: Array, zeros: Array, top: float, codes: Array, start: int, stop: int
) -> None:
    """Round some rows to integers, uint8, up to `top`; scales and zeros are float32 [N, K/G]."""
    size = weight.shape[1] // scales.shape[1]
    last = np.float32(top)
    for row in range(start, stop):
        for group in range(scales.shape[1]):
            scale, zero = scales[row, group], zeros[row, group]
            source = weight[row, group * size : (group + 1) * size]
            target = codes[row, group * size : (group + 1) * size]
            for j in range(len(source)):
                code = (_float(source[j]) / scale + _WHOLE) - _WHOLE + zero
                code = min(max(code, np.float32(0)), last)
                target[j] = np.uint8(np.int32(code))
