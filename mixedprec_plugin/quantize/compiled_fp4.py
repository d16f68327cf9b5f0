"""What `quantize.fp4` quantizes, compiled for a CPU: the same codes and scales.

Blocks lie beside each other, so that a vector register holds one element of each of several blocks,
and sums over a block are torch's additions in torch's order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mixedprec_plugin.quantize.compiled import e4m3_code, e4m3_value
from mixedprec_plugin.quantize.loops import compiled, inlined, over_rows

Array = Any
# blocks that are worked on at once: their elements fill half of a first-level cache
_BLOCKS = 64
_ONE, _SIX = np.float32(1), np.float32(6)
# float32's exponent, that of 1, and what makes of 2**e the number whose last bit is 2**(e - 1)
_EXPONENT, _ONE_BITS = np.int32(0x7F800000), np.int32(127 << 23)
_LAST_BIT = np.int32((22 << 23) + (1 << 22))
_MAGNITUDE, _HIGH = np.int32(0x7FFFFFFF), np.int32(-0x10000)


def quantize(
    weight: torch.Tensor,
    group_size: int,
    unit: float,
    steps: tuple[int, ...],
    limits: tuple[int, int],
    packed: torch.Tensor,
    scales: torch.Tensor,
) -> None:
    """Round a weight in blocks, each with the scale of least squared error.

    Args:
        weight: bfloat16 or float32 [N, K], contiguous, finite.
        group_size: elements along K that share a scale, 16 or 32.
        unit: the global scale, a power of two.
        steps: to codes of scales that are tried, from the one that makes the largest magnitude 6.
        limits: the lowest and the highest code of a scale.
        packed: uint8 [N, K/2], filled.
        scales: e4m3 or e8m0 [N, K/group_size], filled.
    """
    if weight.data_ptr() % 8:
        weight = weight.clone()
    is_float = weight.dtype == torch.float32
    numbers = weight.view(torch.int32 if is_float else torch.int16).numpy().reshape(-1)
    made = scales.view(torch.uint8).numpy().reshape(-1)
    words = packed.numpy().reshape(-1).view(np.int32)
    tried = np.array(steps, np.int32), np.array(limits, np.int32)
    is_e8m0 = scales.dtype == torch.float8_e8m0fnu
    arguments = numbers.view(np.int64), is_float, *tried, is_e8m0, 1 / unit, words, made
    over_rows(_LOOPS[group_size], len(made), *arguments, multiple=_BLOCKS)


@inlined
def _first_code(scale: Any, is_e8m0: Any) -> Any:
    """The code of the nearest scale; e8m0 rounds what is halfway upwards, but for 2**-127."""
    bits = np.float32(scale).view(np.int32)
    e8m0 = np.int32(np.int32(bits + np.int32(1 << 22) - np.int32(bits < 1 << 23)) >> 23)
    return e8m0 if is_e8m0 else e4m3_code(scale)


@inlined
def _scale(code: Any, is_e8m0: Any) -> Any:
    return np.int32(code << 23).view(np.float32) if is_e8m0 else e4m3_value(code)


@inlined
def _nearest(quotient: Any) -> Any:
    """The nearest value of e2m1, ties to the even code."""
    quotient = min(quotient, _SIX)
    power = max(np.int32(np.float32(quotient).view(np.int32) & _EXPONENT), _ONE_BITS)
    large = np.int32(power + _LAST_BIT).view(np.float32)
    return np.float32(quotient + large) - large


@inlined
def _error(value: Any, scale: Any) -> Any:
    """The square of what rounding changes."""
    error = _nearest(value / scale) * scale - value
    return error * error


@compiled
def _load_floats(twos: Array, n: int, bits: Array) -> None:
    """Write blocks, int64 [n * size / 2] of two float32 each, as their bits [size, n]."""
    half = len(bits) // 2
    for j in range(half):
        for r in range(n):
            two = twos[r * half + j]
            bits[2 * j, r], bits[2 * j + 1, r] = np.int32(two), np.int32(two >> 32)


@compiled
def _load(fours: Array, n: int, bits: Array) -> None:
    """Write blocks, int64 [n * size / 4] of four bfloat16 each, as float32's bits [size, n]."""
    quarter = len(bits) // 4
    for j in range(quarter):
        for r in range(n):
            four = fours[r * quarter + j]
            low, high = np.int32(four), np.int32(four >> 32)
            bits[4 * j, r], bits[4 * j + 1, r] = np.int32(low << 16), np.int32(low & _HIGH)
            bits[4 * j + 2, r], bits[4 * j + 3, r] = np.int32(high << 16), np.int32(high & _HIGH)


@compiled
def _measure(bits: Array, unit: Any, is_e8m0: bool, values: Array, first: Array) -> None:
    """Write magnitudes over the unit, and the codes of scales that make the largest 6."""
    top = np.zeros(_BLOCKS, np.float32)
    for j in range(len(bits)):
        for r in range(_BLOCKS):
            value = np.float32(np.int32(bits[j, r] & _MAGNITUDE).view(np.float32) * unit)
            values[j, r] = value
            top[r] = max(top[r], value)
    for r in range(_BLOCKS):
        first[r] = _first_code(top[r] / _SIX, is_e8m0)


@inlined
def _lane(values: Array, k: Any, r: Any, scale: Any, size: Any) -> Any:
    error = _error(values[k, r], scale) + _error(values[k + 8, r], scale)
    if size == 32:
        error += _error(values[k + 16, r], scale)
        error += _error(values[k + 24, r], scale)
    return error


def _try(size: int) -> Any:
    def attempt(
        values: Array, first: Array, step: Any, limits: Array, is_e8m0: bool, least: Array,
        codes: Array,
    ) -> None:  # fmt: skip
        """Take the scales some steps from the first ones where they have less error."""
        low, high = limits
        for r in range(_BLOCKS):
            code = min(max(np.int32(first[r] + step), low), high)
            scale = _scale(code, is_e8m0)
            # a loop over lanes would not be unrolled, and this one not made a vector one
            error = _lane(values, 0, r, scale, size)
            error += _lane(values, 1, r, scale, size)
            error += _lane(values, 2, r, scale, size)
            error += _lane(values, 3, r, scale, size)
            error += _lane(values, 4, r, scale, size)
            error += _lane(values, 5, r, scale, size)
            error += _lane(values, 6, r, scale, size)
            error += _lane(values, 7, r, scale, size)
            before, old = least[r], codes[r]
            # no code is 0, what there is before the first attempt
            is_less = (error < before) | (old == 0)
            least[r] = error if is_less else before
            codes[r] = code if is_less else old

    return compiled(attempt)


@compiled
def _encode(values: Array, bits: Array, codes: Array, is_e8m0: bool, words: Array) -> None:
    """Write words [size / 8, n] of eight codes each, the first one in the lowest bits."""
    for word in range(len(words)):
        for r in range(_BLOCKS):
            scale = _scale(codes[r], is_e8m0)
            made = np.int32(0)
            for k in range(8):
                value = _nearest(values[8 * word + k, r] / scale)
                # exponent and first bit of the mantissa count 1, 1.5, 2, 3, 4, 6 up
                upper = np.int32(np.float32(value).view(np.int32) >> 22) - np.int32(252)
                code = np.int32(value + value) if value < _ONE else np.int32(upper)
                code |= np.int32(np.int32(bits[8 * word + k, r] >> 28) & np.int32(8))
                made |= np.int32(code << np.int32(4 * k))
            words[word, r] = made


_try_16, _try_32 = _try(16), _try(32)


def _blocks(size: int) -> Any:
    def blocks(
        numbers: Array, is_float: bool, steps: Array, limits: Array, is_e8m0: bool, inverse: float,
        words: Array, scales: Array, start: int, stop: int,
    ) -> None:  # fmt: skip
        """As `quantize`, for some blocks, the bits of two float32 or four bfloat16 an int64."""
        bits = np.zeros((size, _BLOCKS), np.int32)
        values = np.zeros((size, _BLOCKS), np.float32)
        first, codes = np.zeros(_BLOCKS, np.int32), np.zeros(_BLOCKS, np.int32)
        least = np.zeros(_BLOCKS, np.float32)
        made = np.zeros((size // 8, _BLOCKS), np.int32)
        for block in range(start, stop, _BLOCKS):
            n = min(_BLOCKS, stop - block)
            source = numbers[block * size // (2 if is_float else 4) :]
            if is_float:
                _load_floats(source, n, bits)
            else:
                _load(source, n, bits)
            _measure(bits, np.float32(inverse), is_e8m0, values, first)
            codes[:] = 0
            for step in steps:
                if size == 16:
                    _try_16(values, first, step, limits, is_e8m0, least, codes)
                else:
                    _try_32(values, first, step, limits, is_e8m0, least, codes)
            _encode(values, bits, codes, is_e8m0, made)
            for r in range(n):
                scales[block + r] = np.uint8(codes[r])
                for word in range(size // 8):
                    words[(block + r) * (size // 8) + word] = made[word, r]

    return compiled(blocks)


_LOOPS = {16: _blocks(16), 32: _blocks(32)}
