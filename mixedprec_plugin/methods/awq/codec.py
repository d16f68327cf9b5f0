"""AWQ's stored form: 4-bit codes with zero points, interleaved along N: w ~= (q - zero) * scale.

Only the form is AWQ's: weights are rounded to nearest, not calibrated, so nothing is folded into
other layers.
Source: AutoAWQ `WQLinear_GEMM` and `AwqQuantizer.pseudo_quantize_tensor`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mixedprec_plugin.errors import MethodError, Problem
from mixedprec_plugin.quantize.checks import (
    require_finite,
    require_packable,
    resolve_group_size,
    take,
    take_matrix,
    weight_shape,
)
from mixedprec_plugin.quantize.chunks import float_chunks, row_chunks
from mixedprec_plugin.quantize.codec import NotTheSameNumbersError, Numbers, Tensors
from mixedprec_plugin.quantize.integers import Integers
from mixedprec_plugin.quantize.packing import AWQ_PACK_FACTOR, pack_awq, unpack_awq
from mixedprec_plugin.quantize.rounding import Grid, round_groups


def quantize(
    weight: torch.Tensor, arguments: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Quantize a weight to group-wise 4-bit integers with zero points, AWQ GEMM layout.

    Args:
        weight: [N, K], floating point, any device; not modified.
        arguments: "group_size" (divides K; -1 for all of K), "clip_search".
        dtype: the running model's dtype, which scales are stored in.
    Returns:
        "qweight" int32 [K, N/8], "qzeros" int32 [K/G, N/8], "scales" [K/G, N] of `dtype`,
        weight ~= (q - zero) * scale.
    Raises:
        ShapeError: not a matrix of floats, not finite, too large for `dtype`, K no multiple of the
            group size, or N no multiple of 8.
        MethodError: no zero points were asked for; AWQ's kernels read them.
    """
    if not arguments.get("zero_point", True):
        raise MethodError(
            Problem(
                "zero_point",
                "False cannot be quantized to (expected True)",
                "use method gptq for symmetric 4-bit weights",
                "zero-point",
            )
        )
    N, K = weight_shape(weight)
    require_packable(N, AWQ_PACK_FACTOR)
    group_size = resolve_group_size(K, arguments["group_size"], pack_factor=1)
    grid = Grid(bits=4, symmetric=False, scale_dtype=dtype)
    num_groups, num_words = K // group_size, N // AWQ_PACK_FACTOR
    qweight = torch.empty((K, num_words), dtype=torch.int32, device=weight.device)
    qzeros = torch.empty((num_groups, num_words), dtype=torch.int32, device=weight.device)
    scales = torch.empty((num_groups, N), dtype=dtype, device=weight.device)
    clip_search = bool(arguments.get("clip_search", False))
    for rows, values in float_chunks(weight, multiple=AWQ_PACK_FACTOR):
        codes, scale, zero = round_groups(values, group_size, grid, clip_search)
        qweight[:, _words(rows)] = pack_awq(codes)
        qzeros[:, _words(rows)] = pack_awq(zero.to(torch.uint8))
        scales[:, rows] = scale.t()
    require_finite(scales, weight)
    return {"qweight": qweight, "qzeros": qzeros, "scales": scales}


def read(tensors: Tensors, arguments: Mapping[str, Any]) -> Integers:
    """Tell the numbers of a layer.

    Args:
        tensors: "qweight" int32 [K, N/8], "qzeros" int32 [K/G, N/8], "scales" [K/G, N] of any
            floating dtype; not modified.
        arguments: "group_size".
    Raises:
        ShapeError: a tensor is missing or of another shape, or K no multiple of the group size.
    """
    qweight = take_matrix(tensors, "qweight", torch.int32, "[K, N/8]")
    K, num_words = qweight.shape
    N = num_words * AWQ_PACK_FACTOR
    group_size = resolve_group_size(K, arguments["group_size"], pack_factor=1)
    scales = take(tensors, "scales", (K // group_size, N)).t()
    zeros = unpack_awq(take(tensors, "qzeros", (K // group_size, num_words)))
    return Integers(
        N,
        K,
        group_size,
        lambda rows: unpack_awq(qweight[:, _words(rows)]),
        zeros.to(torch.int16),
        scales,
    )


def write(
    numbers: Numbers, _arguments: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Store integers in groups of any packing.

    Returns:
        as `quantize`.
    Raises:
        NotTheSameNumbersError: their groups are in act order, a zero point is no 4-bit number, or
            `dtype` does not hold the scales.
    """
    assert isinstance(numbers, Integers)
    scales = numbers.scales_in(dtype)
    if numbers.order is not None:
        raise NotTheSameNumbersError("its groups are in act order")
    low, high = (int(value) for value in torch.aminmax(numbers.zeros))
    if low < 0 or high > 15:
        what = f"it has a zero point of {low if low < 0 else high} (expected 0..15)"
        raise NotTheSameNumbersError(what)
    qweight = torch.empty((numbers.K, numbers.N // AWQ_PACK_FACTOR), dtype=torch.int32)
    for rows in row_chunks(numbers.N, numbers.K, multiple=AWQ_PACK_FACTOR):
        qweight[:, _words(rows)] = pack_awq(numbers.codes(rows))
    qzeros = pack_awq(numbers.zeros.to(torch.uint8)).contiguous()
    return {"qweight": qweight, "qzeros": qzeros, "scales": scales}


def _words(rows: slice) -> slice:
    return slice(rows.start // AWQ_PACK_FACTOR, rows.stop // AWQ_PACK_FACTOR)
