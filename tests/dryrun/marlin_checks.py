"""What the hosts of SGLang's Marlin kernels check before they launch, and what they do not.

Source: sglang/kernels/jit/csrc/gemm/marlin/gptq_marlin_repack.cuh, awq_marlin_repack.cuh and
gptq_marlin.cuh (lines 820 to 960).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

_TILE_K, _TILE_N = 16, 64


def _expect(tensor: torch.Tensor, dtype: torch.dtype, *shape: int) -> None:
    assert tensor.dtype == dtype, (tensor.dtype, dtype)
    assert tuple(tensor.shape) == shape, (tuple(tensor.shape), shape)


def _tiles(size_k: int, size_n: int) -> None:
    assert size_k % _TILE_K == 0, size_k
    assert size_n % _TILE_N == 0, size_n


def _gptq_repack(
    words: torch.Tensor, order: torch.Tensor, out: torch.Tensor, size_k: int, size_n: int, bits: int
) -> None:
    _tiles(size_k, size_n)
    _expect(words, torch.int32, size_k // (32 // bits), size_n)
    _expect(out, torch.int32, size_k // _TILE_K, size_n * _TILE_K // (32 // bits))
    assert order.numel() in (0, size_k)


def _awq_repack(
    out: torch.Tensor, words: torch.Tensor, size_k: int, size_n: int, bits: int
) -> None:
    _tiles(size_k, size_n)
    _expect(words, torch.int32, size_k, size_n // (32 // bits))
    _expect(out, torch.int32, size_k // _TILE_K, size_n * _TILE_K // (32 // bits))


def _gemm(
    a: torch.Tensor,
    words: torch.Tensor,
    scales: torch.Tensor,
    global_scale: torch.Tensor,
    zeros: torch.Tensor,
    g_idx: torch.Tensor,
    order: torch.Tensor,
    out: torch.Tensor,
    _sums: torch.Tensor,
    _sorted: torch.Tensor,
    _workspace: torch.Tensor,
    _type: int,
    is_k_full: bool,
    *_rest: Any,
) -> None:
    size_k, size_n = a.shape[1], out.shape[1]
    _tiles(size_k, size_n)
    packed = words.shape[1] // size_n
    assert tuple(words.shape) == (size_k // _TILE_K, size_n * packed)
    assert packed in (2, 4)
    if global_scale.numel():
        # of FP4 in blocks of 16, and only of that: marlin_template.h:492, 1366
        _expect(global_scale.reshape(()), a.dtype)
        _expect(scales, torch.float8_e4m3fn, size_k // 16, size_n)
    else:
        # the host does not look at the dtype of the scales, and reads them as the activations'
        _expect(scales, a.dtype, scales.shape[0], size_n)
    if g_idx.numel() and order.numel():
        _expect(g_idx, torch.int32, size_k)
        _expect(order, torch.int32, size_k)
        assert scales.shape[0] > 1 or not is_k_full, "act order needs more than one group"
    if is_k_full:
        assert size_k % scales.shape[0] == 0
    if zeros.numel():
        _expect(zeros, torch.int32, scales.shape[0], size_n // 8)


CHECKS: Mapping[str, Callable[..., None]] = {
    "gptq_marlin_repack": _gptq_repack,
    "awq_marlin_repack": _awq_repack,
    "gptq_marlin_gemm": _gemm,
}
