"""Marlin's layout in numpy: as the repacking kernels write it, and as the matmul reads it.

Both sides are written off SGLang's CUDA sources, sglang/kernels/jit/csrc/gemm/marlin/, each from
its own file, so that the one proves the other: repacking from gptq_marlin_repack.cuh and
awq_marlin_repack.cuh, reading from dequant.h (the order in which a word's values come out),
marlin_template.h (the scales and zero points that a thread takes) and the PTX manual's fragment B
of mma.m16n8k16, in which thread t holds k = 2 * (t % 4) + {0, 1, 8, 9} of column t / 4.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]
Codes = NDArray[np.uint32]

TILE_K, TILE_N = 16, 64
_FRAGMENT_K = np.array([0, 1, 8, 9])
_PACK_ORDER = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}
# where awq_marlin_repack.cuh looks for column n % 8 in a word of AWQ's
_AWQ_POSITION = np.array([0, 4, 1, 5, 2, 6, 3, 7])
_THREADS, _WARPS = np.arange(32), np.arange(4)


def gptq_codes(qweight: Words, bits: int) -> Codes:
    """GPTQ's words [K/P, N] -> codes [K, N], as the kernel indexes them: k % P from the low end."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    codes = (qweight[:, None, :] >> shifts[None, :, None]) & np.uint32((1 << bits) - 1)
    return codes.reshape(-1, qweight.shape[1])


def awq_codes(words: Words) -> Codes:
    """AWQ's words [K, N/8] -> codes [K, N], as the kernel undoes the interleaving."""
    shifts = (4 * _AWQ_POSITION).astype(np.uint32)
    codes = (words[:, :, None] >> shifts[None, None, :]) & np.uint32(15)
    return codes.reshape(words.shape[0], -1)


def repack(codes: Codes, bits: int) -> Words:
    """Codes [K, N] -> Marlin's words [K/16, 2*N*bits/4], what thread and warp store where."""
    K, N = codes.shape
    tiles = codes.reshape(K // TILE_K, TILE_K, N // TILE_N, TILE_N).transpose(0, 2, 1, 3)
    k = (_THREADS % 4 * 2)[:, None, None] + _FRAGMENT_K[None, None, :]
    n = (_WARPS * 16)[None, :, None] + (_THREADS // 4)[:, None, None]
    values = np.concatenate([tiles[:, :, k, n], tiles[:, :, k, n + 8]], axis=-1)
    per_word = 32 // bits
    words = values.reshape(*values.shape[:-1], 8 // per_word, per_word)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    packed = np.bitwise_or.reduce(words[..., list(_PACK_ORDER[bits])] << shifts, axis=-1)
    return packed.astype(np.uint32).reshape(K // TILE_K, -1)


def read_codes(words: Words, bits: int) -> Codes:
    """Marlin's words [K/16, ...] -> codes [K, N], as the matmul's fragments hold them."""
    per_word = 32 // bits
    N = words.shape[1] * per_word // TILE_K
    values = _dequantized_order(words, bits).reshape(words.shape[0], N // TILE_N, 32, 4, 2, 4)
    codes = np.zeros((words.shape[0], TILE_K, N // TILE_N, TILE_N), dtype=np.uint32)
    for thread in _THREADS:
        for warp in _WARPS:
            for half in range(2):
                column = warp * 16 + half * 8 + thread // 4
                rows = thread % 4 * 2 + _FRAGMENT_K
                codes[:, rows, :, column] = values[:, :, thread, warp, half].transpose(2, 0, 1)
    return codes.reshape(-1, N)


def _dequantized_order(words: Words, bits: int) -> Codes:
    """The values of each word in the order of `dequant`'s fragments: words [...] -> [..., P].

    4 bits: masks 0x000f000f and 0x00f000f0 pair nibbles 0, 4 and 1, 5; then the word is shifted
    by 8. 8 bits: the byte selectors 0x5250 and 0x5351 pair bytes 0, 2 and 1, 3.
    """
    order = (0, 4, 1, 5, 2, 6, 3, 7) if bits == 4 else (0, 2, 1, 3)
    shifts = (bits * np.array(order)).astype(np.uint32)
    return (words[..., None] >> shifts) & np.uint32((1 << bits) - 1)


def read_group_scales(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """Permuted scales [K/G, N] -> by column.

    Thread t takes eight values from 8 * (t / 4) on, for its columns t / 4 + 8 * j of 64.
    """
    blocks = scales.reshape(scales.shape[0], -1, 8, 8)
    return blocks.transpose(0, 1, 3, 2).reshape(scales.shape)


def read_channel_scales(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """Permuted scales [1, N] of whole columns -> by column.

    They multiply the results, whose fragment holds columns 2 * (t % 4) + {0, 1} of each 8: thread t
    takes eight values from 8 * (t % 4) on, for four such blocks.
    """
    blocks = scales.reshape(scales.shape[0], -1, 4, 4, 2)
    return blocks.transpose(0, 1, 3, 2, 4).reshape(scales.shape)


def read_zero_points(words: Words) -> Codes:
    """Permuted zero points [K/G, N/8] -> [K/G, N]: one word a thread, dequantized as weights are,
    for the columns t / 4 + 8 * j of 64."""
    values = _dequantized_order(words, 4).reshape(words.shape[0], -1, 8, 8)
    return values.transpose(0, 1, 3, 2).reshape(words.shape[0], -1)
