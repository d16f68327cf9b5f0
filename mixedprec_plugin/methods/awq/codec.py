"""AWQ's stored form: 4-bit codes with zero points, interleaved along N: w ~= (q - zero) * scale.

    qweight   int32 [K, N/8]
    qzeros    int32 [K/G, N/8]
    scales    [K/G, N], of any floating dtype

Only the form is AWQ's: weights are rounded to nearest, not calibrated, so nothing is folded into
other layers.
Source: AutoAWQ `WQLinear_GEMM` and `AwqQuantizer.pseudo_quantize_tensor`.
"""

from __future__ import annotations

from functools import partial

import torch

from mixedprec_plugin.errors import MethodError, Problem
from mixedprec_plugin.quantize.checks import resolve_group_size, take, take_matrix
from mixedprec_plugin.quantize.codec import (
    Arguments,
    NotTheSameNumbersError,
    Numbers,
    TensorDict,
    Tensors,
)
from mixedprec_plugin.quantize.integers import Integers, Words
from mixedprec_plugin.quantize.packing import AWQ_PACK_FACTOR, pack_awq, unpack_awq, unpack_awq_rows
from mixedprec_plugin.quantize.rounding import Grid

_WORDS = Words(
    bits=4, along_k=1, pack=pack_awq, pack_zeros=lambda zeros: pack_awq(zeros.to(torch.uint8))
)


def quantize(weight: torch.Tensor, arguments: Arguments, dtype: torch.dtype) -> TensorDict:
    """Quantize a weight to group-wise 4-bit integers with zero points.

    Raises:
        MethodError: no zero points were asked for; AWQ's kernels read them.
    """
    if not arguments.get("zero_point", True):
        what = "False cannot be quantized to (expected True)"
        remedy = "use method gptq for symmetric 4-bit weights"
        raise MethodError(Problem("zero_point", what, remedy, "zero-point"))
    return _WORDS.quantize(weight, arguments, grid(arguments, dtype))


def grid(_arguments: Arguments, dtype: torch.dtype) -> Grid:
    return Grid(bits=4, symmetric=False, scale_dtype=dtype)


def read(tensors: Tensors, arguments: Arguments) -> Integers:
    """Tell the numbers of a layer; of the arguments "group_size" is read."""
    qweight = take_matrix(tensors, "qweight", torch.int32, "[K, N/8]")
    K, num_words = qweight.shape
    N = num_words * AWQ_PACK_FACTOR
    group_size = resolve_group_size(K, arguments["group_size"], pack_factor=1)
    scales = take(tensors, "scales", (K // group_size, N)).t()
    zeros = unpack_awq(take(tensors, "qzeros", (K // group_size, num_words)))

    codes = partial(unpack_awq_rows, qweight)
    return Integers(N, K, group_size, codes, zeros.to(torch.int16), scales)


def write(numbers: Numbers, _arguments: Arguments, dtype: torch.dtype) -> TensorDict:
    """Store integers in groups of any packing, but in act order or with other zero points."""
    assert isinstance(numbers, Integers)
    if numbers.order is not None:
        raise NotTheSameNumbersError("its groups are in act order")
    low, high = (int(value) for value in torch.aminmax(numbers.zeros))
    if low < 0 or high > 15:
        what = f"it has a zero point of {low if low < 0 else high} (expected 0..15)"
        raise NotTheSameNumbersError(what)
    return _WORDS.write(numbers, dtype)
