"""GPTQ's stored form: 4- or 8-bit codes packed along K: w ~= (q - zero) * scale.

Only the form is GPTQ's: weights are rounded to nearest, not calibrated.
`qzeros` hold zero - 1 in format v1 (the usual one, and what is written here) and zero in v2
(`checkpoint_format: gptq_v2`). A stored 15 in v1 reads as 16.
Source: AutoGPTQ and GPTQModel `QuantLinear.pack` and `dequantize_weight`.
"""

from __future__ import annotations

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
from mixedprec_plugin.quantize.integers import Integers, Words, plain_order
from mixedprec_plugin.quantize.packing import pack, unpack
from mixedprec_plugin.quantize.rounding import Grid


def _words(bits: int) -> Words:
    def pack_zeros(zeros: torch.Tensor) -> torch.Tensor:
        # `contiguous` would keep the strides of a single row, which cannot be viewed as words
        rows = (zeros - 1).to(torch.uint8).t().clone(memory_format=torch.contiguous_format)
        return pack(rows, bits)

    return Words(bits, 32 // bits, lambda codes: pack(codes, bits).t(), pack_zeros)


def quantize(weight: torch.Tensor, arguments: Arguments, dtype: torch.dtype) -> TensorDict:
    """Quantize a weight to group-wise unsigned integers, symmetric, GPTQ v1 layout.

    Returns:
        "qweight" int32 [K/(32/bits), N], "qzeros" int32 [K/G, N/(32/bits)] holding zero - 1,
        "scales" [K/G, N] of `dtype`, some of them negative, "g_idx" int32 [K], the group of every
        input feature; weight ~= (q - 2**(bits-1)) * scale.
    Raises:
        ShapeError: as `Words.quantize`.
        MethodError: zero points or an activation order were asked for, which a weight cannot give.
    """
    _require_plain(arguments)
    bits = int(arguments["bits"])
    made = _words(bits).quantize(weight, arguments, grid(arguments, dtype))
    K = weight.shape[1]
    return {**made, "g_idx": plain_order(K, K // len(made["scales"]), weight.device)}


def grid(arguments: Arguments, dtype: torch.dtype) -> Grid:
    """What codes stand for; see `Codec.grid`."""
    return Grid(bits=int(arguments["bits"]), symmetric=True, scale_dtype=dtype)


def read(tensors: Tensors, arguments: Arguments) -> Integers:
    """Tell the numbers of any GPTQ layer: symmetric or not, v1 or v2, in any order of groups.

    Args:
        tensors: "qweight" int32 [K/(32/bits), N], "qzeros" int32 [K/G, N/(32/bits)], "scales"
            [K/G, N] of any floating dtype, and "g_idx" int32 [K], the group of every input feature,
            which may be missing where groups are in order; not modified.
        arguments: "bits", "group_size", and optionally "checkpoint_format" ("gptq" or "gptq_v2").
    Raises:
        ShapeError: a tensor is missing or of another shape, or K no multiple of the group size.
    """
    bits = int(arguments["bits"])
    pack_factor = 32 // bits
    qweight = take_matrix(tensors, "qweight", torch.int32, f"[K/{pack_factor}, N]")
    K, N = qweight.shape[0] * pack_factor, qweight.shape[1]
    group_size = resolve_group_size(K, arguments["group_size"], pack_factor)
    num_groups = K // group_size
    scales = take(tensors, "scales", (num_groups, N)).t()
    zeros = unpack(take(tensors, "qzeros", (num_groups, N // pack_factor)), bits).t()
    is_v1 = arguments.get("checkpoint_format") != "gptq_v2"
    g_idx = take(tensors, "g_idx", (K,)) if "g_idx" in tensors else None
    return Integers(
        N,
        K,
        group_size,
        lambda rows: unpack(qweight[:, rows].t(), bits),
        zeros.to(torch.int16) + int(is_v1),
        scales,
        g_idx,
        keeps_order=True,
    )


def write(numbers: Numbers, arguments: Arguments, dtype: torch.dtype) -> TensorDict:
    """Store integers in groups of any packing, as `quantize` does.

    Args:
        arguments: "bits", "desc_act".
    Raises:
        NotTheSameNumbersError: their groups are in an act order that was not asked for, a zero
            point is not the middle of the range, or `dtype` does not hold the scales.
    """
    assert isinstance(numbers, Integers)
    bits = int(arguments["bits"])
    if not arguments["desc_act"] and numbers.order is not None:
        remedy = "write desc_act: true" if numbers.keeps_order else ""
        raise NotTheSameNumbersError("its groups are in act order", remedy)
    middle = 1 << (bits - 1)
    odd = int((numbers.zeros != middle).sum())
    if odd:
        what = (
            f"{odd:,} of its {numbers.zeros.numel():,} zero points are not {middle}, and gptq is "
            "served symmetric only"
        )
        raise NotTheSameNumbersError(what, can_round=True)
    g_idx = numbers.g_idx if arguments["desc_act"] else None
    if g_idx is None:
        g_idx = plain_order(numbers.K, numbers.group_size)
    return {**_words(bits).write(numbers, dtype), "g_idx": g_idx.to(torch.int32)}


def take_stored(tensors: Tensors, arguments: Arguments, *, checks: bool) -> TensorDict:
    """Return a stored layer's tensors with a "g_idx" int32 [K], the group of every input feature.

    SGLang's kernels read no zero points (all are the middle of the range) and, without act order,
    no g_idx (groups are in order): a layer that breaks either would load cleanly and emit garbage.

    Args:
        tensors, arguments: as for `read`, and "desc_act".
        checks: whether these kernels run it.
    Raises:
        NotTheSameNumbersError: the layer breaks either.
        ShapeError: the group size does not divide K.
    """
    bits = int(arguments["bits"])
    K = tensors["qweight"].shape[0] * 32 // bits
    plain = plain_order(K, resolve_group_size(K, arguments["group_size"], 32 // bits))
    g_idx = tensors.get("g_idx", plain)
    if checks and (reason := _why_not_plain(tensors, g_idx, plain, bits, arguments["desc_act"])):
        raise NotTheSameNumbersError(reason)
    return {**tensors, "g_idx": g_idx}


def _why_not_plain(
    tensors: Tensors, g_idx: torch.Tensor, plain: torch.Tensor, bits: int, desc_act: bool
) -> str:
    stored_zero = (1 << (bits - 1)) - 1
    word = sum(stored_zero << shift for shift in range(0, 32, bits))
    if bool((tensors["qzeros"] != word).any()):
        return f"its zero points are not all {stored_zero + 1}, as a symmetric layer's are"
    if not desc_act and not torch.equal(g_idx, plain):
        return "its g_idx is not in order, which it is where desc_act is false"
    least, most, num_groups = int(g_idx.min()), int(g_idx.max()), tensors["scales"].shape[0]
    if desc_act and (least < 0 or most >= num_groups):
        # kernels read the scales of whatever group they are told, behind the last one too
        return (
            f"its g_idx holds groups from {least} to {most} (expected 0 to {num_groups - 1}, as it "
            f"has scales for {num_groups})"
        )
    return ""


def _require_plain(arguments: Arguments) -> None:
    """Refuse what rounding to nearest cannot make."""
    for name, plain in (("sym", True), ("desc_act", False)):
        value = arguments.get(name)
        if value is not None and bool(value) is not plain:
            raise MethodError(
                Problem(
                    name,
                    f"{value!r} cannot be quantized to (expected {plain})",
                    f"use {name}: {str(plain).lower()}, or take the layer from a source that "
                    "stores it so",
                    "gptq-plain",
                )
            )
