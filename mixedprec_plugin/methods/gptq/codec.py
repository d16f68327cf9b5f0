"""GPTQ's stored form: 4- or 8-bit codes packed along K: w ~= (q - zero) * scale.

Only the form is GPTQ's: weights are rounded to nearest, not calibrated.
`qzeros` hold zero - 1 in format v1 (the usual one, and what is written here) and zero in v2
(`checkpoint_format: gptq_v2`), each within its bits: a stored 15 in v1 is a zero point of 0.
Source: AutoGPTQ and GPTQModel `QuantLinear.pack` and `dequantize_weight`, GPTQModel
`_shift_gptq_qzeros`.
"""

from __future__ import annotations

import torch

from mixedprec_plugin.errors import MethodError, Problem
from mixedprec_plugin.quantize.checks import refuse, resolve_group_size, take, take_matrix
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

_V2 = "gptq_v2"
# zero points that are not alike by chance
_ENOUGH = 32


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
    grid = Grid(bits=bits, symmetric=True, scale_dtype=dtype)
    made = _words(bits).quantize(weight, arguments, grid)
    K = weight.shape[1]
    return {**made, "g_idx": plain_order(K, K // len(made["scales"]), weight.device)}


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
    qzeros = take(tensors, "qzeros", (num_groups, N // pack_factor))
    is_v1 = arguments.get("checkpoint_format") != _V2
    g_idx = take(tensors, "g_idx", (K,)) if "g_idx" in tensors else None
    return Integers(
        N,
        K,
        group_size,
        lambda rows: unpack(qweight[:, rows].t(), bits),
        _zero_points(qzeros, bits, is_v1=is_v1).t(),
        scales,
        g_idx,
        keeps_order=True,
    )


def _zero_points(qzeros: torch.Tensor, bits: int, *, is_v1: bool) -> torch.Tensor:
    """The zero points, int16 [K/G, N], in the convention that config.json says or values tell.

    Where all are alike they are the middle of the range, as no quantizer has another one for every
    group: there are checkpoints of v2 zeros that say v1 (https://github.com/vllm-project/vllm/pull/
    38966).

    Raises:
        ShapeError: they are alike, and the middle in neither convention.
    """
    stored, middle = unpack(qzeros, bits).to(torch.int16), 1 << (bits - 1)
    first = int(stored[0, 0])
    if stored.numel() >= _ENOUGH and bool((stored == first).all()):
        if first not in (middle - 1, middle):
            what = f"all are {first} (expected {middle - 1}, or {middle} in {_V2}, or several)"
            refuse("qzeros", what, "take the layer from another source", "zero-points")
        return torch.full_like(stored, middle)
    return (stored + int(is_v1)) & ((1 << bits) - 1)


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
    served = {"g_idx": plain, **tensors}
    is_v1, most = arguments.get("checkpoint_format") != _V2, (1 << bits) - 1
    if not checks:
        if is_v1 and bool((unpack(tensors["qzeros"], bits) == most).any()):
            raise NotTheSameNumbersError(f"has zero points of 0, which SGLang reads as {most + 1}")
        return served
    if reason := _why_not_plain(served, plain, bits, arguments["desc_act"], is_v1=is_v1):
        raise NotTheSameNumbersError(reason)
    stored_zero = most >> 1
    word = sum(stored_zero << shift for shift in range(0, 32, bits))
    return {**served, "qzeros": torch.full_like(tensors["qzeros"], word)}


def _why_not_plain(
    tensors: Tensors, plain: torch.Tensor, bits: int, desc_act: bool, *, is_v1: bool
) -> str:
    middle, g_idx = 1 << (bits - 1), tensors["g_idx"]
    if bool((_zero_points(tensors["qzeros"], bits, is_v1=is_v1) != middle).any()):
        return f"its zero points are not all {middle}, as a symmetric layer's are"
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
