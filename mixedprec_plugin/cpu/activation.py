"""Quantizes activations as SGLang's CUDA paths do.

All functions work in float32 whatever the input's dtype, and return the codes together with the
scales: x ~= codes * scale. The functions of groups raise ShapeError where K is no multiple.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from mixedprec_plugin.errors import Problem, ShapeError

FP8_MAX = 448.0
INT8_MIN, INT8_MAX = -128.0, 127.0
EPSILON = 1e-10


def quantize_fp8_groups(x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize every group of elements along K to e4m3, for the block matmul.

    Args:
        x: [T, K], floating point; K is a multiple of group_size.
    Returns:
        codes float8_e4m3fn [T, K]; scales float32 [T, K/G].
    Source:
        the kernel that SGLang runs on NVIDIA, kernels/jit/csrc/gemm/per_token_group_quant.cuh:326:
        scale = amax * fl(1/448), code = x * (448 / amax), amax at least 1e-10. Triton's kernel,
        which other devices run, multiplies by the rounded reciprocal of the rounded scale: a code
        differs by one step in 0.03% of places.
    """
    groups = _groups(x, group_size)
    amax = _amax(groups)
    # A full tensor as numerator: torch computes `448.0 / t` as `reciprocal(t) * 448`.
    codes = (groups * (torch.full_like(amax, FP8_MAX) / amax)).clamp_(-FP8_MAX, FP8_MAX)
    scales = amax * torch.tensor(1.0 / FP8_MAX, dtype=torch.float32)
    return codes.to(torch.float8_e4m3fn).view(x.shape), scales.squeeze(-1)


def quantize_int8_groups(x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize every group of elements along K to int8, for the block matmul.

    Args:
        x: [T, K], floating point; K is a multiple of group_size.
    Returns:
        codes int8 [T, K], truncated towards zero, not rounded; scales float32 [T, K/G].
    Source:
        the Triton kernel that SGLang's INT8 linear runs on every device,
        kernels/ops/quantization/int8_kernel.py: scale = max(amax, 1e-10) / 127,
        code = clamp(x / scale, -128, 127).
    """
    groups = _groups(x, group_size)
    scales = _amax(groups) / INT8_MAX
    codes = (groups / scales).clamp_(INT8_MIN, INT8_MAX)
    return codes.to(torch.int8).view(x.shape), scales.squeeze(-1)


def quantize_fp8_tokens(
    x: torch.Tensor, greatest: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.clone
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize every token to e4m3 with one scale.

    Args:
        x: [T, K], floating point.
        greatest: the greatest magnitude of every token here -> that of all its parts, float32
            [T, 1], where x is a part of the tokens' columns.
    Returns:
        codes float8_e4m3fn [T, K]; scales float32 [T, 1]. A row of zeros has codes and scale 0.
    Source:
        kernels/jit/csrc/gemm/per_token_quant_fp8.cuh: scale = amax / 448, code = x * fl(1/scale).
    """
    x = x.float()
    scales = greatest(x.abs().amax(dim=-1, keepdim=True)) / FP8_MAX
    inverse = torch.where(scales == 0, 0.0, scales.reciprocal())
    codes = (x * inverse).clamp_(-FP8_MAX, FP8_MAX)
    return codes.to(torch.float8_e4m3fn), scales


def quantize_int8_tokens(
    x: torch.Tensor, greatest: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.clone
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize every token to int8 with one scale.

    Args:
        x: [T, K], floating point.
        greatest: as of `quantize_fp8_tokens`.
    Returns:
        codes int8 [T, K], rounded to the nearest, halves away from zero; scales float32 [T, 1].
    Source:
        the Triton kernel that SGLang runs on every device, kernels/ops/quantization/int8_kernel.py,
        _per_token_quant_int8: amax = max(absmax, 1e-10), scale = amax / 127,
        code = round(x * (127 / amax)).
    """
    x = x.float()
    amax = greatest(x.abs().amax(dim=-1, keepdim=True)).clamp_(min=EPSILON)
    values = x * (torch.full_like(amax, INT8_MAX) / amax)
    # torch.round takes halves to even
    codes = values.trunc()
    codes += values.sign().mul_((values - codes).abs() >= 0.5)
    return codes.to(torch.int8), amax / INT8_MAX


def quantize_fp8_static(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Quantize activations to e4m3 with the scale that the checkpoint holds.

    Args:
        x: [T, K], floating point.
        scale: float32, one element.
    Returns:
        codes float8_e4m3fn [T, K].
    Source:
        kernels/ops/quantization/fp8_kernel.py, _static_quant_fp8: clamp(x * fl(1/scale), +-448).
    """
    codes = (x.float() * scale.reciprocal()).clamp_(-FP8_MAX, FP8_MAX)
    return codes.to(torch.float8_e4m3fn)


def _groups(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """[T, K] -> float32 [T, K/G, G]."""
    num_tokens, num_columns = x.shape
    num_groups, rest = divmod(num_columns, group_size)
    if rest:
        what = f"K = {num_columns} (expected a multiple of {group_size}, the block size)"
        raise ShapeError(Problem("", what, "give the layer a method without blocks"))
    return x.float().reshape(num_tokens, num_groups, group_size)


def _amax(groups: torch.Tensor) -> torch.Tensor:
    """Greatest magnitude of every group, at least EPSILON, [T, K/G, 1]."""
    return groups.abs().amax(dim=-1, keepdim=True).clamp_(min=EPSILON)
