"""The inner loops of `quantize.feedback` on a CPU, compiled: a tile of output features at a time.

Tiles are as wide as vector registers are long, or several times that, so that every innermost loop
is a few vector instructions on what lies in the first-level cache. The same arithmetic in the same
order as torch's, but for sums over a group.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mixedprec_plugin.quantize.loops import compiled, inlined
from mixedprec_plugin.quantize.rounding import Levels

TILE = 32

Array = Any


def code_levels(levels: Levels) -> Array:
    """What the loops round a number with: float32 of [least, to its step, to its bits]."""
    # added and taken off again, 1.5 * 2**23 steps round a number below half of it to a step; and
    # x * factor - (x * factor - x) has as many bits less as the factor is a power of 2, and 1
    factor = 2.0 ** (24 - levels.bits) + 1 if levels.bits else 0.0
    return np.array([levels.least, 1.5 * 2**23 * levels.step, factor], np.float32)


@inlined
def _nearest(x: Any, least: Any, step: Any, factor: Any) -> Any:
    """The nearest code to a number; Veltkamp's split where codes are floats."""
    if abs(x) < least:
        return (x + step) - step
    large = x * factor
    return large - (large - x)


@compiled
def _load(tile: Array, source: Array, first: int, n: int) -> None:
    """Copy `n` columns of [G, N] to the tile; what is beside them is left over and not used."""
    for j in range(len(tile)):
        for r in range(n):
            tile[j, r] = source[j, first + r]


@compiled
def search(
    targets: Array, importance: Array, scales: Array, zeros: Array, losses: Array,
    low: float, top: float, levels: Array, start: int, stop: int,
) -> None:  # fmt: skip
    """Tell what each candidate costs each row, in weighted squared error.

    Args:
        targets: float32 [G, N].
        importance: float32 [G].
        scales, zeros: float32 [C, N], the candidates.
        losses: float32 [C, N], filled.
        low, top: the lowest and the largest code.
        levels: of `code_levels`.
        start, stop: the rows to do; these four of all loops.
    """
    G = len(targets)
    lowest, last = np.float32(low), np.float32(top)
    least, step, factor = levels
    tile = np.zeros((G, TILE), np.float32)
    scale, inverse = np.ones(TILE, np.float32), np.ones(TILE, np.float32)
    below, above = np.zeros(TILE, np.float32), np.zeros(TILE, np.float32)
    loss = np.empty(TILE, np.float32)
    for first in range(start, stop, TILE):
        n = min(TILE, stop - first)
        _load(tile, targets, first, n)
        for c in range(len(scales)):
            for r in range(n):
                scale[r] = scales[c, first + r]
                inverse[r] = np.float32(1) / scale[r]
                below[r] = lowest - zeros[c, first + r]
                above[r] = last - zeros[c, first + r]
            loss[:] = np.float32(0)
            for j in range(G):
                weight = importance[j]
                for r in range(TILE):
                    x = tile[j, r]
                    code = _nearest(x * inverse[r], least, step, factor)
                    code = min(max(code, below[r]), above[r])
                    error = code * scale[r] - x
                    loss[r] += error * error * weight
            for r in range(n):
                losses[c, first + r] = loss[r]


@compiled
def round_columns(
    targets: Array, weight: Array, M: Array, scale: Array, zero: Array, codes: Array, errors: Array,
    low: float, top: float, levels: Array, start: int, stop: int,
) -> None:  # fmt: skip
    """Round columns in turn, each error fed back to the later ones.

    Args:
        targets, weight: float32 [G, N]; not modified.
        M: float32 [G, G], unit upper triangular.
        scale, zero: float32 [N].
        codes, errors: float32 [G, N], filled.
    """
    G = len(targets)
    lowest, last = np.float32(low), np.float32(top)
    least, step, factor = levels
    tile = np.zeros((G, TILE), np.float32)
    inverse, own = np.ones(TILE, np.float32), np.ones(TILE, np.float32)
    shift, error = np.zeros(TILE, np.float32), np.zeros(TILE, np.float32)
    for first in range(start, stop, TILE):
        n = min(TILE, stop - first)
        _load(tile, targets, first, n)
        for r in range(n):
            own[r] = scale[first + r]
            inverse[r] = np.float32(1) / own[r]
            shift[r] = zero[first + r]
        for j in range(G):
            for r in range(n):
                code = _nearest(tile[j, r] * inverse[r], least, step, factor) + shift[r]
                code = min(max(code, lowest), last)
                error[r] = (code - shift[r]) * own[r] - weight[j, first + r]
                codes[j, first + r] = code
                errors[j, first + r] = error[r]
            for k in range(j + 1, G):
                multiple = M[j, k]
                for r in range(TILE):
                    tile[k, r] -= multiple * error[r]


@compiled
def move_codes(
    codes: Array, gradient: Array, H: Array, scale: Array, change: Array,
    low: float, top: float, levels: Array, start: int, stop: int,
) -> None:  # fmt: skip
    """Move each code of a group to where the loss is least, the others as they are.

    Args:
        codes: float32 [G, N], moved.
        gradient: float32 [G, N], kept up to date.
        H: float32 [G, G].
        scale: float32 [N].
        change: float32 [G, N], filled with the change of the errors.
    """
    G = len(codes)
    lowest, last = np.float32(low), np.float32(top)
    least, step, factor = levels
    tile = np.zeros((G, TILE), np.float32)
    own, inverse = np.ones(TILE, np.float32), np.ones(TILE, np.float32)
    moves = np.zeros(TILE, np.float32)
    for first in range(start, stop, TILE):
        n = min(TILE, stop - first)
        _load(tile, gradient, first, n)
        for r in range(n):
            own[r] = scale[first + r]
            inverse[r] = np.float32(1) / own[r]
        for j in range(G):
            curve = np.float32(-1) / H[j, j]
            moved = False
            for r in range(n):
                before = codes[j, first + r]
                best = before + tile[j, r] * inverse[r] * curve
                code = min(max(_nearest(best, least, step, factor), lowest), last)
                codes[j, first + r] = code
                moves[r] = (code - before) * own[r]
                change[j, first + r] = moves[r]
                moved |= code != before
            if moved:
                for k in range(G):
                    multiple = H[j, k]
                    for r in range(TILE):
                        tile[k, r] += multiple * moves[r]
        for j in range(G):
            for r in range(n):
                gradient[j, first + r] = tile[j, r]
