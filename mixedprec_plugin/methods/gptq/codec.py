"""GPTQ's stored form: 4- or 8-bit codes packed along K: w ~= (q - zero) * scale.

    qweight   int32 [K/(32/bits), N]
    qzeros    int32 [K/G, N/(32/bits)]
    scales    [K/G, N], of any floating dtype; symmetric ones may be negative
    g_idx     int32 [K], the group of every input feature; may be missing where groups are in order

Only the form is GPTQ's: weights are rounded to nearest, not calibrated.
`qzeros` hold zero - 1 in format v1 (the usual one, and what is written here) and zero in v2
(`checkpoint_format: gptq_v2`), each within its bits: a stored 15 in v1 is a zero point of 0.
Source: AutoGPTQ and GPTQModel `QuantLinear.pack` and `dequantize_weight`, GPTQModel
`_shift_gptq_qzeros`.
"""

from __future__ import annotations

from functools import partial

import torch

from mixedprec_plugin.errors import MethodError, Problem
from mixedprec_plugin.methods.gptq import V2
from mixedprec_plugin.quantize.checks import refuse, resolve_group_size, take, take_matrix
from mixedprec_plugin.quantize.codec import (
    Arguments,
    NotTheSameNumbersError,
    Numbers,
    TensorDict,
    Tensors,
)
from mixedprec_plugin.quantize.integers import Integers, Words, plain_order
from mixedprec_plugin.quantize.packing import pack, unpack, unpack_along_k
from mixedprec_plugin.quantize.rounding import Grid

# zero points that are not alike by chance, and rows whose mean tells something
_ENOUGH, _SAMPLE, _FEW = 32, 512, 8


def _words(bits: int) -> Words:
    return Words(
        bits,
        along_k=32 // bits,
        pack=lambda codes: pack(codes, bits).t(),
        pack_zeros=lambda zeros: pack((zeros - 1).to(torch.uint8).t(), bits),
    )


def quantize(weight: torch.Tensor, arguments: Arguments, dtype: torch.dtype) -> TensorDict:
    """Quantize a weight to group-wise unsigned integers, symmetric, GPTQ v1 layout.

    Raises:
        MethodError: zero points or an activation order were asked for, which a weight cannot give.
    """
    _require_plain(arguments)
    bits = int(arguments["bits"])
    made = _words(bits).quantize(weight, arguments, grid(arguments, dtype))
    K = weight.shape[1]
    return {**made, "g_idx": plain_order(K, K // len(made["scales"]), weight.device)}


def grid(arguments: Arguments, dtype: torch.dtype) -> Grid:
    return Grid(bits=int(arguments["bits"]), symmetric=True, scale_dtype=dtype)


def read(tensors: Tensors, arguments: Arguments) -> Integers:
    """Tell the numbers of any GPTQ layer: symmetric or not, v1 or v2, in any order of groups.

    Args:
        arguments: "bits", "group_size", and optionally "checkpoint_format" ("gptq" or "gptq_v2").
    """
    bits = int(arguments["bits"])
    pack_factor = 32 // bits
    qweight = take_matrix(tensors, "qweight", torch.int32, f"[K/{pack_factor}, N]")
    K, N = qweight.shape[0] * pack_factor, qweight.shape[1]
    group_size = resolve_group_size(K, arguments["group_size"], pack_factor)
    num_groups = K // group_size
    scales = take(tensors, "scales", (num_groups, N)).t()
    take(tensors, "qzeros", (num_groups, N // pack_factor))
    zeros, order = _zero_points(tensors, arguments).t(), _order(tensors, arguments, K)
    codes = partial(unpack_along_k, qweight, bits=bits)
    return Integers(N, K, group_size, codes, zeros, scales, order, keeps_order=True)


def _order(tensors: Tensors, arguments: Arguments, K: int) -> torch.Tensor | None:
    """The stored "g_idx"; None where it is missing or, as AutoGPTQ takes it too, was never set."""
    g_idx = take(tensors, "g_idx", (K,)) if "g_idx" in tensors else None
    is_unset = g_idx is not None and not arguments.get("desc_act") and not bool(g_idx.any())
    return None if is_unset else g_idx


def _zero_points(tensors: Tensors, arguments: Arguments) -> torch.Tensor:
    """The zero points, int16 [K/G, N], in the convention that config.json says or values tell.

    There are checkpoints of v2 zeros that say v1 (https://github.com/vllm-project/vllm/pull/38966).
    Where all zeros are alike they are the middle of the range, as no quantizer has another one for
    every group. Others are told by codes whose mean, the zero point of weights that are zero in the
    mean, is nearer to what the other convention says.

    Raises:
        ShapeError: they are alike, and the middle in neither convention; or, of 8 bits, codes
            are nearer to another one than config.json says.
    """
    bits, qzeros, qweight = int(arguments["bits"]), tensors["qzeros"], tensors["qweight"]
    stored, middle = unpack(qzeros, bits).to(torch.int16), 1 << (bits - 1)
    first = int(stored[0, 0])
    if stored.numel() >= _ENOUGH and bool((stored == first).all()):
        if first not in (middle - 1, middle):
            what = f"all are {first} (expected {middle - 1}, or {middle} in {V2}, or several)"
            refuse("qzeros", what, "take the layer from another source", "zero-points")
        return torch.full_like(stored, middle)
    is_v1 = arguments.get("checkpoint_format") != V2
    rows = stored[:, :_SAMPLE].float()
    codes = unpack(qweight[:, :_SAMPLE].t(), bits).float()
    # a v1 zero of 0 is stored as the largest code
    differences = (codes.mean(1) - rows.mean(0))[(rows < 2 * middle - 1).all(0)]
    if len(differences) >= _ENOUGH:
        mean, error = float(differences.mean()), float(differences.std()) / len(differences) ** 0.5
        if abs(mean - (not is_v1)) < 0.25 and error < 0.1:
            if bits == 8:
                # one code is a fiftieth of the weights' RMS, as small as their mean may be
                what = "nothing tells whether all of them are stored one less"
                refuse("qzeros", what, "take the layer from another source", "zero-points")
            is_v1 = not is_v1
    zeros = (stored + int(is_v1)) & (2 * middle - 1)
    if bits == 4 and is_v1:
        # as GPTQModel writes and reads v1: a zero of 0 takes one from its neighbour in the word
        in_words = unpack(qzeros + 0x11111111, bits).to(torch.int16)
        if _is_nearer(in_words, zeros, qweight, _order(tensors, arguments, qweight.shape[0] * 8)):
            return in_words
    return zeros


def _is_nearer(
    ours: torch.Tensor, others: torch.Tensor, qweight: torch.Tensor, g_idx: torch.Tensor | None
) -> bool:
    """Whether zero points, one more than others where they differ, are nearer to codes' mean."""
    differs = ours != others
    rows = differs.any(0).nonzero().flatten()
    if not len(rows):
        return False
    codes = unpack(qweight[:, rows].t(), 4).float()
    if g_idx is not None:
        codes = codes[:, g_idx.argsort(stable=True)]
    means = codes.view(len(rows), len(ours), -1).mean(2).t()
    beyond = (means - others[:, rows])[differs[:, rows]] - 0.5
    error = float(beyond.std()) / len(beyond) ** 0.5 if len(beyond) > _FEW else float("inf")
    if abs(float(beyond.mean())) < 2 * error:
        what = f"nothing tells whether {len(beyond):,} of them are stored one less, beside one of 0"
        refuse("qzeros", what, "take the layer from another source", "zero-points")
    return float(beyond.mean()) > 0


def write(numbers: Numbers, arguments: Arguments, dtype: torch.dtype) -> TensorDict:
    """Store integers in groups, symmetric, and in act order only if `desc_act` asks for it."""
    assert isinstance(numbers, Integers)
    bits = int(arguments["bits"])
    if not arguments["desc_act"] and numbers.order is not None:
        remedy = "write desc_act: true" if numbers.keeps_order else ""
        raise NotTheSameNumbersError("its groups are in act order", remedy)
    numbers.require_symmetric(bits, "gptq")
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
    order = _order(tensors, arguments, K)
    served = {**tensors, "g_idx": plain if order is None else order}
    zeros, most = _zero_points(tensors, arguments), (1 << bits) - 1
    if not checks:
        # a symmetric layer's are not read
        is_v1 = arguments.get("checkpoint_format") != V2
        said = unpack(tensors["qzeros"], bits).short() + int(is_v1)
        wrong = int((zeros != said).sum())
        if wrong and bool((zeros != 1 << (bits - 1)).any()):
            what = f"SGLang would read {wrong:,} of its {zeros.numel():,} zero points wrongly"
            raise NotTheSameNumbersError(what)
        return served
    if reason := _why_not_plain(served, zeros, plain, bits, arguments["desc_act"]):
        raise NotTheSameNumbersError(reason)
    stored_zero = most >> 1
    word = sum(stored_zero << shift for shift in range(0, 32, bits))
    return {**served, "qzeros": torch.full_like(tensors["qzeros"], word)}


def _why_not_plain(
    tensors: Tensors, zeros: torch.Tensor, plain: torch.Tensor, bits: int, desc_act: bool
) -> str:
    middle, g_idx = 1 << (bits - 1), tensors["g_idx"]
    if bool((zeros != middle).any()):
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
            asked = str(plain).lower()
            what = f"{value!r} cannot be quantized to (expected {plain})"
            remedy = f"use {name}: {asked}, or take the layer from a source that stores it so"
            raise MethodError(Problem(name, what, remedy, "gptq-plain"))
