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


def pack_columns(
    codes: torch.Tensor, bits: int, words: torch.Tensor, first: int, *, along_k: bool
) -> None:
    """Write what `packing.pack` makes, transposed, or what `packing.pack_awq` does.

    Args:
        codes: uint8 [R, K], contiguous, each below 2**bits.
        bits: 4, or along K 8.
        words: int32 [K * bits / 32, N] or [K, N/8]; as many columns as R fills, from `first` on.
        along_k: whether a word holds codes of one row; else of eight rows.
    """
    num_columns = len(codes) if along_k else len(codes) // 8
    arguments = codes.numpy(), bits, along_k, words.numpy(), first
    over_rows(_pack_columns, num_columns, *arguments, multiple=_LINE)


def unpack_columns(
    words: torch.Tensor, bits: int, first: int, codes: torch.Tensor, *, along_k: bool
) -> None:
    """Undo `pack_columns`; `words` are contiguous, and `codes` filled."""
    num_columns = len(codes) if along_k else len(codes) // 8
    arguments = words.numpy(), bits, along_k, first, codes.numpy()
    over_rows(_unpack_columns, num_columns, *arguments, multiple=_LINE)


def pack_rows(codes: torch.Tensor, bits: int, words: torch.Tensor) -> None:
    """Write what `packing.pack` makes of codes of less than 8 bits; all contiguous."""
    over_rows(_pack_rows, len(codes), codes.numpy().view(np.uint32), bits, words.numpy())


def unpack_rows(words: torch.Tensor, bits: int, codes: torch.Tensor) -> None:
    """Undo `pack_rows`."""
    over_rows(_unpack_rows, len(codes), words.numpy(), bits, codes.numpy().view(np.uint32))


@compiled
def _pack_columns(
    codes: Array, bits: int, along_k: bool, words: Array, first: int, start: int, stop: int
) -> None:
    """Put codes, uint8 [R, K], into columns of [., N], for some columns."""
    tile = np.empty((_LINE, _COLUMNS), np.int32)
    for column in range(start, stop, _LINE):
        n = min(_LINE, stop - column)
        for row in range(0, len(words), _COLUMNS):
            part = words[row : row + _COLUMNS]
            for r in range(n):
                target = tile[r, : len(part)]
                if not along_k:
                    eight = codes[8 * (column + r) : 8 * (column + r + 1), row : row + len(part)]
                    _squeeze_rows(eight, target)
                elif bits == 4:
                    _squeeze(codes[column + r].view(np.uint64)[row : row + len(part)], target)
                else:
                    target[:] = codes[column + r].view(np.int32)[row : row + len(part)]
            for j in range(len(part)):
                line = part[j, first + column : first + column + n]
                for r in range(len(line)):
                    line[r] = tile[r, j]


@compiled
def _unpack_columns(
    words: Array, bits: int, along_k: bool, first: int, codes: Array, start: int, stop: int
) -> None:
    """Take codes, uint8 [R, K], out of columns of [., N], for some columns."""
    tile = np.empty((_LINE, _COLUMNS), np.int32)
    for column in range(start, stop, _LINE):
        n = min(_LINE, stop - column)
        for row in range(0, len(words), _COLUMNS):
            part = words[row : row + _COLUMNS]
            for j in range(len(part)):
                line = part[j, first + column : first + column + n]
                for r in range(len(line)):
                    tile[r, j] = line[r]
            for r in range(n):
                source = tile[r, : len(part)]
                if not along_k:
                    eight = codes[8 * (column + r) : 8 * (column + r + 1), row : row + len(part)]
                    _spread_rows(source, eight)
                elif bits == 4:
                    _spread(source, codes[column + r].view(np.uint64)[row : row + len(part)])
                else:
                    codes[column + r].view(np.int32)[row : row + len(part)] = source


@compiled
def _squeeze(eights: Array, words: Array) -> None:
    """Put eight codes, an uint64, into each word."""
    for j in range(len(words)):
        pairs = (eights[j] | (eights[j] >> np.uint64(4))) & _BYTES
        fours = (pairs | (pairs >> np.uint64(8))) & _PAIRS
        words[j] = np.int32(fours | (fours >> np.uint64(16)))


@compiled
def _spread(words: Array, eights: Array) -> None:
    """Undo `_squeeze`."""
    for j in range(len(words)):
        word = np.uint64(np.uint32(words[j]))
        fours = (word | (word << np.uint64(16))) & _PAIRS
        pairs = (fours | (fours << np.uint64(8))) & _BYTES
        eights[j] = (pairs | (pairs << np.uint64(4))) & _NIBBLES


@inlined
def _octet(low: Any, high: Any) -> Any:
    return np.uint32(np.uint8(low | (high << 4)))


@compiled
def _squeeze_rows(eight: Array, words: Array) -> None:
    """Put eight rows of codes into words, in AWQ's order."""
    # columns 0, 2, 4, 6, 1, 3, 5, 7 from the low end
    a, b, c, d = eight[0], eight[2], eight[4], eight[6]
    e, f, g, h = eight[1], eight[3], eight[5], eight[7]
    for j in range(len(words)):
        low = _octet(a[j], b[j]) | (_octet(c[j], d[j]) << 8)
        high = _octet(e[j], f[j]) | (_octet(g[j], h[j]) << 8)
        words[j] = np.int32(low | np.uint32(high << 16))


@compiled
def _spread_rows(words: Array, eight: Array) -> None:
    """Undo `_squeeze_rows`."""
    for nibble in range(8):
        target, shift = eight[_AWQ_ORDER[nibble]], np.uint32(4 * nibble)
        for j in range(len(target)):
            target[j] = np.uint8(np.uint32(np.uint32(words[j]) >> shift) & _NIBBLE)


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
