"""compressed-tensors' numbers: pack-quantized read, and all that it can hold written.

Codes and packed zero points are stored with 2**(bits-1) added; in their difference it cancels.
Source: compressed-tensors `PackedQuantizationCompressor` and `pack_to_int32`.
"""

from __future__ import annotations

import torch

from mixedprec_plugin.quantize.checks import refuse, resolve_group_size, take, take_matrix
from mixedprec_plugin.quantize.chunks import row_chunks
from mixedprec_plugin.quantize.codec import Arguments, Numbers, TensorDict, Tensors
from mixedprec_plugin.quantize.integers import Integers
from mixedprec_plugin.quantize.packing import pack, unpack
from mixedprec_plugin.quantize.scaled import Scaled


def read(tensors: Tensors, arguments: Arguments) -> Integers:
    """Tell the numbers of a pack-quantized weight, symmetric or not, in any order of groups.

    Args:
        arguments: "bits" (4 or 8), "group_size" (-1 for all of K).
    """
    bits = int(arguments["bits"])
    packed = take_matrix(tensors, "weight_packed", torch.int32, f"[N, K/{32 // bits}]")
    N, K = packed.shape[0], packed.shape[1] * 32 // bits
    group_size = resolve_group_size(K, arguments["group_size"], 32 // bits)
    shape = tensors.get("weight_shape")
    # or the last word is partly filled
    if shape is not None and shape.tolist() != [N, K]:
        what = f"{shape.tolist()} (expected {[N, K]}, what weight_packed holds)"
        remedy = "take the layer from a checkpoint in another format"
        refuse("weight_shape", what, remedy, "tensor-shape")
    scales = take(tensors, "weight_scale", (N, K // group_size))
    g_idx = take(tensors, "weight_g_idx", (K,)) if "weight_g_idx" in tensors else None
    # the library writes -1 where groups were never ordered
    order = None if g_idx is None or int(g_idx.min()) == -1 else g_idx.to(torch.int32)
    zeros = _zeros(tensors, bits, (N, K // group_size))

    def codes(rows: slice) -> torch.Tensor:
        return unpack(packed[rows], bits)

    return Integers(N, K, group_size, codes, zeros, scales, order, "weight_g_idx")


def _zeros(tensors: Tensors, bits: int, shape: tuple[int, int]) -> torch.Tensor:
    """The codes' zero points, int16 [N, K/G]."""
    middle = 1 << (bits - 1)
    zeros = tensors.get("weight_zero_point")
    if zeros is None:
        device = tensors["weight_scale"].device
        return torch.full(shape, middle, dtype=torch.int16, device=device)
    if zeros.dtype == torch.int8:
        return take(tensors, "weight_zero_point", shape).to(torch.int16) + middle
    words = take(tensors, "weight_zero_point", (-(-shape[0] * bits // 32), shape[1]))
    return unpack(words.t(), bits).t()[: shape[0]].to(torch.int16)


def write(numbers: Numbers, arguments: Arguments, dtype: torch.dtype) -> TensorDict:
    """Store numbers that `why_not_written` has nothing against as `written` says.

    Args:
        arguments: of integers, "bits" and "symmetric", whether zero points are left out.
        dtype: not used: scales keep theirs. One scale may have any shape.
    """
    if isinstance(numbers, Scaled):
        inputs = {} if numbers.input_scale is None else {"input_scale": numbers.input_scale}
        return {"weight": numbers.codes, "weight_scale": numbers.scales, **inputs}
    assert isinstance(numbers, Integers)
    bits: int = arguments["bits"]
    packed = torch.empty((numbers.N, numbers.K * bits // 32), dtype=torch.int32)
    for rows in row_chunks(numbers.N, numbers.K, multiple=8):
        packed[rows] = pack(numbers.codes(rows), bits)
    made = {
        "weight_packed": packed,
        "weight_scale": numbers.scales.contiguous(),
        "weight_shape": torch.tensor([numbers.N, numbers.K]),
    }
    if not arguments["symmetric"]:
        zeros = numbers.zeros.to(torch.uint8).t().contiguous()
        made["weight_zero_point"] = pack(zeros, bits).t().contiguous()
    return made
