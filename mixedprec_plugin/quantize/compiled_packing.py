"""What `quantize.packing` does, compiled for a CPU.

Where words lie across the rows of codes, some rows are packed for as many columns as a tile has,
which is written to, or read from, whole cache lines.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mixedprec_plugin.quantize.loops import compiled, inlined, over_rows

# column of an AWQ word's nibbles, from the low end
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

Array = Any
# words of a cache line, and how many are packed for each at a time
_LINE, _COLUMNS = 16, 64
_BYTES, _PAIRS = np.uint64(0x00FF00FF00FF00FF), np.uint64(0x0000FFFF0000FFFF)
_EVEN, _LOW = np.uint64(0x00FF00FF), np.uint64(0xFFFF)
_WORD, _FULL = np.uint64(32), np.uint64(0xFFFFFFFF)
_NIBBLES, _NIBBLE = np.uint64(0x0F0F0F0F0F0F0F0F), np.uint32(15)


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


def pack_rows(codes: torch.Tensor, bits: int, words: torch.Tensor) -> None:
    """Write what `packing.pack` makes.

    Args:
        codes: uint8 [R, K], contiguous, each below 2**bits.
        bits: less than 8.
        words: int32 [R, K * bits / 32], contiguous, filled.
    """
    over_rows(_pack_rows, len(codes), codes.numpy().view(np.uint32), bits, words.numpy())


def unpack_rows(words: torch.Tensor, bits: int, codes: torch.Tensor) -> None:
    """Undo `pack_rows`."""
    over_rows(_unpack_rows, len(codes), words.numpy(), bits, codes.numpy().view(np.uint32))


def unpack_along_k(words: torch.Tensor, bits: int, first: int, codes: torch.Tensor) -> None:
    """Undo `pack_along_k`.

    Args:
        words: int32 [K * bits / 32, N], contiguous.
        bits: 4 or 8.
        codes: uint8 [R, K], filled from the columns from `first` to `first` + R.
    """
    target = codes.numpy().view(np.uint64 if bits == 4 else np.uint32)
    kernel = _unpack_4_bits if bits == 4 else _transpose_back
    over_rows(kernel, len(codes), words.numpy(), first, target, multiple=_LINE)


def unpack_awq(words: torch.Tensor, first: int, codes: torch.Tensor) -> None:
    """Undo `pack_awq`.

    Args:
        words: int32 [K, N/8], contiguous.
        codes: uint8 [R, K], filled from the columns from `first` to `first` + R/8.
    """
    over_rows(_unpack_awq, len(codes) // 8, words.numpy(), first, codes.numpy(), multiple=_LINE)


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


@inlined
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


@compiled
def _unpack_4_bits(words: Array, first: int, codes: Array, start: int, stop: int) -> None:
    """Spread words of [K/8, N] to the eight codes of an uint64 [R, K/8], for some rows."""
    tile = np.empty((_LINE, _COLUMNS), np.int32)
    for row in range(start, stop, _LINE):
        n = min(_LINE, stop - row)
        for column in range(0, codes.shape[1], _COLUMNS):
            _gather(words[column : column + _COLUMNS], first + row, n, tile)
            for r in range(n):
                source, target = tile[r], codes[row + r, column : column + _COLUMNS]
                for j in range(len(target)):
                    word = np.uint64(np.uint32(source[j]))
                    fours = (word | (word << np.uint64(16))) & _PAIRS
                    pairs = (fours | (fours << np.uint64(8))) & _BYTES
                    target[j] = (pairs | (pairs << np.uint64(4))) & _NIBBLES


@compiled
def _transpose_back(words: Array, first: int, codes: Array, start: int, stop: int) -> None:
    """Turn words of [K/4, N] to uint32 [R, K/4], for some rows."""
    tile = np.empty((_LINE, _COLUMNS), np.int32)
    for row in range(start, stop, _LINE):
        n = min(_LINE, stop - row)
        for column in range(0, codes.shape[1], _COLUMNS):
            _gather(words[column : column + _COLUMNS], first + row, n, tile)
            for r in range(n):
                source, target = tile[r], codes[row + r, column : column + _COLUMNS]
                for j in range(len(target)):
                    target[j] = np.uint32(source[j])


@compiled
def _unpack_awq(words: Array, first: int, codes: Array, start: int, stop: int) -> None:
    """Take eight rows of codes, uint8 [R, K], out of each column of [K, N/8], for some columns."""
    tile = np.empty((_LINE, _COLUMNS), np.int32)
    for word in range(start, stop, _LINE):
        n = min(_LINE, stop - word)
        for column in range(0, codes.shape[1], _COLUMNS):
            _gather(words[column : column + _COLUMNS], first + word, n, tile)
            for r in range(n):
                source = tile[r]
                for nibble in range(8):
                    row = 8 * (word + r) + _AWQ_ORDER[nibble]
                    target, shift = codes[row, column : column + _COLUMNS], np.uint32(4 * nibble)
                    for j in range(len(target)):
                        target[j] = np.uint8(np.uint32(np.uint32(source[j]) >> shift) & _NIBBLE)


@compiled
def _pack_rows(codes: Array, bits: int, words: Array, start: int, stop: int) -> None:
    """Put four codes of an uint32 [R, K/4] after the other into a stream, for some rows."""
    apart, together, four = np.uint64(8 - bits), np.uint64(16 - 2 * bits), np.uint64(4 * bits)
    for row in range(start, stop):
        source, target = codes[row], words[row]
        stream, fill, place = np.uint64(0), np.uint64(0), 0
        for j in range(len(source)):
            code = np.uint64(source[j])
            pairs = (code & _EVEN) | ((code & ~_EVEN) >> apart)
            stream |= ((pairs & _LOW) | ((pairs & ~_LOW) >> together)) << fill
            fill += four
            if fill >= _WORD:
                target[place] = np.int32(stream & _FULL)
                stream, fill, place = stream >> _WORD, fill - _WORD, place + 1


@compiled
def _unpack_rows(words: Array, bits: int, codes: Array, start: int, stop: int) -> None:
    """Take four codes of an uint32 [R, K/4] after the other out of a stream, for some rows."""
    apart, together, four = np.uint64(8 - bits), np.uint64(16 - 2 * bits), np.uint64(4 * bits)
    code = np.uint64((1 << bits) - 1)
    evens, pair = code | (code << np.uint64(16)), np.uint64((1 << 2 * bits) - 1)
    odds = evens << np.uint64(bits)
    for row in range(start, stop):
        source, target = words[row], codes[row]
        stream, fill, place = np.uint64(0), np.uint64(0), 0
        for j in range(len(target)):
            if fill < four:
                stream |= np.uint64(np.uint32(source[place])) << fill
                fill, place = fill + _WORD, place + 1
            pairs = (stream & pair) | ((stream << together) & (pair << np.uint64(16)))
            target[j] = np.uint32((pairs & evens) | ((pairs & odds) << apart))
            stream, fill = stream >> four, fill - four


@compiled
def _gather(words: Array, first: int, n: int, tile: Array) -> None:
    """Read columns, from one on, to the first rows of a tile."""
    for j in range(len(words)):
        source = words[j, first : first + n]
        for r in range(len(source)):
            tile[r, j] = source[r]
