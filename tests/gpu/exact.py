"""What a linear layer is defined to compute, in float64, and how far SGLang's kernels may be off.

Nothing here comes from the package.
"""

from __future__ import annotations

import dataclasses
import math

import torch

GROUP = 128
_FP8_MAX, _INT8_MAX = 448.0, 127.0
# One rounding to bfloat16 (8 bits): evenly spread over half a step, which is 2**-8 of the value at
# most.
ROUNDING = 2**-8 / math.sqrt(3)
# Hopper keeps 13 bits below the greatest exponent of a sum of FP8 products, and adds 32 products at
# a time.
_FP8_STEP, _FP8_PRODUCTS = 2**-13, 32
# Of `inputs`, no other number than the greatest of a group is near a boundary between two codes.
# INT8 truncates, and the greatest, 127 scales, stands on one: one in 128 may be a step off.
_GREATEST = 251 / 64
_INT8_TURNED = math.sqrt(1 / GROUP) * _GREATEST / 127
# With a scale a token INT8 rounds: half of the greatest, one number in 1,000, stands between two.
_INT8_HALVES = math.sqrt(1 / 1000) * _GREATEST / 127
# `fp8_static` has a scale of 0.01, with which powers of two stand on a boundary, 1 in 128 numbers;
# a step is an eighth to a sixteenth of the value.
_STATIC_TURNED = math.sqrt(1 / GROUP) * 0.094
# as marlin_utils.py, should_use_atomic_add_reduce, and gptq_marlin.cuh:758 choose
_ATOMIC_K, _ATOMIC_N = 2048, 2048
_MARLIN_TILE_K = 64


def inputs(num_tokens: int, K: int) -> torch.Tensor:
    """Normal numbers, bfloat16 [T, K], with the same greatest number in each group.

    One whose 8 bits are a prime: of all numbers in bfloat16, 1 in 16 would stand on a boundary of
    FP8's codes, and any rounding of a scale would push it over. None does here.
    """
    generator = torch.Generator().manual_seed(num_tokens)
    values = torch.randn(num_tokens, K, generator=generator).clamp_(-3.9, 3.9)
    values[:, ::GROUP] = _GREATEST
    return values.bfloat16()


def quantized_input(method: str, x: torch.Tensor, static_scale: float = 0.0) -> torch.Tensor:
    """The activations that a method's kernel multiplies.

    Args:
        method: a title of `tests.dryrun.methods.METHODS`.
        x: [T, K], bfloat16.
        static_scale: of `fp8_static`.
    Returns:
        float64 [T, K].
    """
    values = x.double()
    if method == "fp8_static":
        return _round_fp8(values / static_scale) * static_scale
    if method in ("fp8", "fp8_channel"):
        scale = values.abs().amax(1, keepdim=True) / _FP8_MAX
        return _round_fp8(values / scale) * scale
    if method == "int8_channel":
        scale = values.abs().amax(1, keepdim=True) / _INT8_MAX
        return ((values / scale).abs() + 0.5).floor() * values.sign() * scale
    if method not in ("fp8_block", "blockwise_int8"):
        return values
    groups = values.view(len(x), -1, GROUP)
    greatest = groups.abs().amax(2, keepdim=True)
    if method == "fp8_block":
        codes, scale = _round_fp8(groups / greatest * _FP8_MAX), greatest / _FP8_MAX
    else:
        codes, scale = (groups / greatest * _INT8_MAX).trunc(), greatest / _INT8_MAX
    return (codes * scale).view_as(values)


def _round_fp8(values: torch.Tensor) -> torch.Tensor:
    clamped = values.clamp(-_FP8_MAX, _FP8_MAX).float()
    return clamped.to(torch.float8_e4m3fn).double()


def tolerance(
    method: str, num_tokens: int, N: int, K: int, *, has_bias: bool, is_marlin: bool
) -> float:
    """Greatest root mean square of differences that a kernel's roundings explain, relative.

    Args:
        method: a title of `tests.dryrun.methods.METHODS`.
        N, K: of one rank.
        has_bias: it is added after a rounding.
        is_marlin: weights are multiplied by their scales in bfloat16, and where K is long and N
            short, SGLang has parts of K added up in bfloat16.
    """
    roundings = 1.0 + has_bias
    if method == "unquantized":
        # cuBLAS may split K, and round each part
        roundings += 1
    if method.startswith(("awq", "gptq", "humming", "nvfp4")):
        roundings += 1 if is_marlin else 2
    is_atomic = K >= _ATOMIC_K and N < _ATOMIC_N and math.ceil(num_tokens / 64) * N <= _ATOMIC_N
    if is_marlin and is_atomic:
        # part i of n is added to a sum that has i/n of the whole's square
        roundings += (K / _MARLIN_TILE_K + 1) / 2
    squares = roundings * ROUNDING**2
    lost = 0.0
    if method in ("fp8", "fp8_channel", "fp8_static"):
        lost = K / _FP8_PRODUCTS * _FP8_STEP
        squares += _STATIC_TURNED**2 if method == "fp8_static" else 0
    elif method == "fp8_block":
        lost = GROUP / _FP8_PRODUCTS * _FP8_STEP
    elif method == "blockwise_int8":
        squares += _INT8_TURNED**2
    elif method == "int8_channel":
        squares += _INT8_HALVES**2
    return math.sqrt(squares) + lost


@dataclasses.dataclass(frozen=True)
class Off:
    """How far a layer's outputs are off.

    Attributes:
        mean: root mean square of the differences over that of the exact outputs.
        worst: the same of the token where it is greatest.
        limit: of the mean, by the roundings; a token may be off by twice as much.
    """

    mean: float
    worst: float
    limit: float

    @property
    def is_within(self) -> bool:
        """Whether roundings explain it."""
        return self.mean <= self.limit and self.worst <= 2 * self.limit

    def __str__(self) -> str:
        return f"{self.mean:.5f} (worst {self.worst:.5f}, limit {self.limit:.5f})"


def compare(out: torch.Tensor, exact: torch.Tensor, limit: float) -> Off:
    """Hold outputs [T, N] against the exact ones, float64 on the CPU."""
    error = (out.cpu().double() - exact).square().mean(1)
    size = exact.square().mean(1)
    assert bool((error[size == 0] == 0).all()), "a token of zeros did not give zeros"
    kept = size > 0
    if not bool(kept.any()):
        return Off(0.0, 0.0, limit)
    worst = (error[kept] / size[kept]).max().sqrt()
    return Off(float((error.sum() / size.sum()).sqrt()), float(worst), limit)
