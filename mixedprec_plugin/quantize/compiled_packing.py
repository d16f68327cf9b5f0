"""What `quantize.packing` does where words lie across the rows of codes, compiled for a CPU.

Some rows are packed for as many columns as a tile has, which is written to whole cache lines.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch

from mixedprec_plugin.quantize.loops import compiled, over_rows

Array = Any
# words of a cache line, and how many are packed for each at a time
_LINE, _COLUMNS = 16, 64
_BYTES, _PAIRS = np.uint64(0x00FF00FF00FF00FF), np.uint64(0x0000FFFF0000FFFF)


def pack_along_k(codes: torch.Tensor, bits: int, words: torch.Tensor, first: int) -> None:
    """Write what `packing.pack` makes, transposed.

    Args:
        codes: uint8 [R, K], contiguous, each below 2**bits.
        bits: 4 or 8.
        words: int32 [K * bits / 32, N]; the columns from `first` to `first` + R are filled.
    """
    source = codes.numpy().view(np.uint64 if bits == 4 else np.uint32)
    kernel = _pack_4_bits if bits == 4 else _transpose
    over_rows(kernel, len(codes), source, words.numpy(), first, multiple=_LINE)


def pack_awq(codes: torch.Tensor, words: torch.Tensor, first: int) -> None:
    """Write what `packing.pack_awq` makes.

    Args:
        codes: uint8 [R, K], contiguous, each below 16; R is a multiple of 8.
        words: int32 [K, N/8]; the columns from `first` to `first` + R/8 are filled.
    """
    over_rows(_pack_awq, len(codes) // 8, codes.numpy(), words.numpy(), first, multiple=_LINE)


@compiled
def _pack_4_bits(codes: Array, words: Array, first: int, start: int, stop: int) -> None:
    """Squeeze the eight codes of an uint64 [R, K/8] to a word of [K/8, N], for some rows."""
    tile = np.empty((_LINE, _COLUMNS), np.int32)
    for row in range(start, stop, _LINE):
        n = min(_LINE, stop - row)
        for column in range(0, codes.shape[1], _COLUMNS):
            for r in range(n):
                source, target = codes[row + r, column : column + _COLUMNS], tile[r]
                for j in range(len(source)):
                    pairs = (source[j] | (source[j] >> np.uint64(4))) & _BYTES
                    fours = (pairs | (pairs >> np.uint64(8))) & _PAIRS
                    target[j] = np.int32(fours | (fours >> np.uint64(16)))
            _spread(tile, n, words[column : column + _COLUMNS], first + row)


@compiled
def _transpose(codes: Array, words: Array, first: int, start: int, stop: int) -> None:
    """Turn words, uint32 [R, K/4], to [K/4, N], for some rows."""
    tile = np.empty((_LINE, _COLUMNS), np.int32)
    for row in range(start, stop, _LINE):
        n = min(_LINE, stop - row)
        for column in range(0, codes.shape[1], _COLUMNS):
            for r in range(n):
                source, target = codes[row + r, column : column + _COLUMNS], tile[r]
                for j in range(len(source)):
                    target[j] = np.int32(source[j])
            _spread(tile, n, words[column : column + _COLUMNS], first + row)


@numba.njit(inline="always")  # type: ignore[untyped-decorator]
def _octet(low: Any, high: Any) -> Any:
    return np.uint32(np.uint8(low | (high << 4)))


@compiled
def _pack_awq(codes: Array, words: Array, first: int, start: int, stop: int) -> None:
    """Put eight rows of codes, uint8 [R, K], into each column of [K, N/8], for some columns."""
    tile = np.empty((_LINE, _COLUMNS), np.int32)
    for word in range(start, stop, _LINE):
        n = min(_LINE, stop - word)
        for column in range(0, codes.shape[1], _COLUMNS):
            for r in range(n):
                eight = codes[8 * (word + r) : 8 * (word + r + 1), column : column + _COLUMNS]
                # columns 0, 2, 4, 6, 1, 3, 5, 7 from the low end
                a, b, c, d = eight[0], eight[2], eight[4], eight[6]
                e, f, g, h = eight[1], eight[3], eight[5], eight[7]
                target = tile[r]
                for j in range(len(a)):
                    low = _octet(a[j], b[j]) | (_octet(c[j], d[j]) << 8)
                    high = _octet(e[j], f[j]) | (_octet(g[j], h[j]) << 8)
                    target[j] = np.int32(low | np.uint32(high << 16))
            _spread(tile, n, words[column : column + _COLUMNS], first + word)


@compiled
def _spread(tile: Array, n: int, words: Array, first: int) -> None:
    """Write the first rows of a tile to columns, from one on."""
    for j in range(len(words)):
        target = words[j, first : first + n]
        for r in range(len(target)):
            target[r] = tile[r, j]
