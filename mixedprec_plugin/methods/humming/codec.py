"""humming's stored form: codes of 2 to 8 bits as a stream along K: W = (q - 2**(bits-1)) * scale.

    weight         int32 [N, K*bits/32]
    weight_scale   [N, K/G], some of them negative

Source: humming-kernels 0.1.12, `HummingWeightSchema` (humming/schema/humming.py),
`dequantize_weight` (humming/utils/weight.py).
"""

from __future__ import annotations

import torch

from mixedprec_plugin.methods.humming import codes_a_word
from mixedprec_plugin.quantize import checks
from mixedprec_plugin.quantize.chunks import empty, row_chunks
from mixedprec_plugin.quantize.codec import (
    Arguments,
    NotTheSameNumbersError,
    Numbers,
    TensorDict,
    Tensors,
)
from mixedprec_plugin.quantize.integers import WHOLE_WORDS, Integers, rounded
from mixedprec_plugin.quantize.packing import pack, unpack
from mixedprec_plugin.quantize.rounding import Grid


def quantize(weight: torch.Tensor, arguments: Arguments, dtype: torch.dtype) -> TensorDict:
    """Quantize a weight to group-wise unsigned integers, symmetric."""
    N, K = checks.weight_shape(weight)
    bits = int(arguments["bits"])
    group_size = checks.resolve_group_size(K, arguments["group_size"], codes_a_word(bits))
    packed = empty((N, K * bits // 32), torch.int32, weight.device)
    scales = torch.empty((N, K // group_size), dtype=dtype, device=weight.device)
    for rows, codes, scale, _ in rounded(weight, group_size, grid(arguments, dtype)):
        packed[rows], scales[rows] = pack(codes, bits, N * K), scale
    checks.require_finite(scales, weight)
    return {"weight": packed, "weight_scale": scales}


def grid(arguments: Arguments, dtype: torch.dtype) -> Grid:
    return Grid(bits=int(arguments["bits"]), symmetric=True, scale_dtype=dtype)


def read(tensors: Tensors, arguments: Arguments) -> Integers:
    """Tell the numbers of a layer; of the arguments "bits" and "group_size" are read."""
    bits = int(arguments["bits"])
    words = checks.take_matrix(tensors, "weight", torch.int32, "[N, K*bits/32]")
    (N, num_words), middle = words.shape, 1 << (bits - 1)
    K, rest = divmod(32 * num_words, bits)
    if rest:
        what = f"{num_words} words a row are no whole codes of {bits} bits"
        checks.refuse("weight", what, "check bits against the checkpoint", "tensor-shape")
    group_size = checks.resolve_group_size(K, arguments["group_size"], codes_a_word(bits))
    scales = checks.take(tensors, "weight_scale", (N, K // group_size))
    zeros = torch.full(scales.shape, middle, dtype=torch.int16, device=scales.device)

    def codes(rows: slice) -> torch.Tensor:
        return unpack(words[rows], bits, N * K)

    return Integers(N, K, group_size, codes, zeros, scales)


def write(numbers: Numbers, arguments: Arguments, dtype: torch.dtype) -> TensorDict:
    """Store integers in groups of any packing, but in act order or with zero points."""
    assert isinstance(numbers, Integers)
    bits = int(arguments["bits"])
    if numbers.order is not None:
        raise NotTheSameNumbersError("its groups are in act order")
    numbers.require_symmetric(bits, "humming")
    scales = numbers.scales_in(dtype).t().contiguous()
    shape = numbers.N, numbers.K * bits // 32
    packed = empty(shape, torch.int32, scales.device)
    for rows in row_chunks(numbers.N, numbers.K, multiple=WHOLE_WORDS):
        packed[rows] = pack(numbers.codes(rows), bits, numbers.N * numbers.K)
    return {"weight": packed, "weight_scale": scales}
