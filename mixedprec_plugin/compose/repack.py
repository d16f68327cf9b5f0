"""Repack a layer into another format that holds the same numbers; see `plan.repacking`.

Codes, zero points and scales are moved, never computed anew. Where the values turn out to be what
the other format cannot hold, that is an error: nothing is rounded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch

from mixedprec_plugin.checkpoint.formats import StoredFormat
from mixedprec_plugin.errors import CheckpointError, Problem
from mixedprec_plugin.preset.model import Scheme
from mixedprec_plugin.quantize.checks import resolve_group_size
from mixedprec_plugin.quantize.chunks import row_chunks
from mixedprec_plugin.quantize.packing import AWQ_PACK_FACTOR, pack, pack_awq, unpack, unpack_awq

Tensors = Mapping[str, torch.Tensor]

_DEQUANTIZE = "match it with method: bf16 to dequantize it"
_REQUANTIZE = "write requantize: true to round it anew, or method: bf16 to dequantize it"


class NotTheSameNumbersError(ValueError):
    """The values are none that the other format holds; carries what to do instead."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what)
        self.remedy = remedy


@dataclasses.dataclass(frozen=True)
class _Integers:
    """Codes of W = (q - zero) * scale, in whatever packing.

    Attributes:
        codes: rows -> uint8 [rows, K].
        zeros: int16 [N, K/G].
        scales: [N, K/G], in the stored dtype.
        g_idx: int32 [K], the group of every input feature; None where groups are in order.
    """

    codes: Callable[[slice], torch.Tensor]
    zeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor | None


def repack(
    name: str, stored: StoredFormat, scheme: Scheme, tensors: Tensors, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Repack one layer.

    Args:
        name: the layer's name, for the messages.
        stored: how it is stored; `plan.repacking.is_repackable` said yes.
        scheme: what it shall be.
        tensors: parameter suffix -> stored tensor; not modified.
        dtype: the running model's dtype, which scales of integers in groups are served in.
    Returns:
        the scheme's tensors, and those that are no part of the matrix (a bias) as they are.
    Raises:
        CheckpointError: the values are not what headers and config.json promised.
        ShapeError: a tensor is missing or of another shape.
    """
    try:
        if scheme.method in ("awq", "gptq"):
            made = _repack_integers(stored, scheme, tensors, dtype)
        else:
            made = _rename_scales(stored, scheme, tensors)
    except NotTheSameNumbersError as error:
        raise CheckpointError(
            Problem(
                name,
                f"is stored as {stored.description} and was to be repacked as {scheme.method}, "
                f"but {error}",
                error.remedy,
                "repack",
            )
        ) from error
    rest = {suffix: t for suffix, t in tensors.items() if suffix not in stored.suffixes}
    return {**made, **rest}


def _rename_scales(
    stored: StoredFormat, scheme: Scheme, tensors: Tensors
) -> dict[str, torch.Tensor]:
    """8-bit codes stay, scales get SGLang's name, dtype (float32 holds all others) and shape."""
    scale = tensors[stored.dequantizer_arguments["scale"]].float()
    if scheme.method == "fp8_channel":
        channels = scale.view(-1, 1).expand(stored.N, 1).contiguous()
        return {"weight": tensors["weight"], "weight_scale": channels}
    is_block = scheme.arguments["weight_block_size"] is not None
    made = {"weight": tensors["weight"]}
    made["weight_scale_inv" if is_block else "weight_scale"] = scale if is_block else scale.view(())
    if "input_scale" in tensors:
        made["input_scale"] = tensors["input_scale"].float().view(())
    return made


def _repack_integers(
    stored: StoredFormat, scheme: Scheme, tensors: Tensors, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    integers = _READERS[stored.family](tensors, stored)
    _check_cast(integers.scales, dtype)
    _check_order(integers, stored, scheme)
    if scheme.method == "awq":
        return _write_awq(integers, stored, dtype)
    return _write_gptq(integers, stored, scheme, dtype)


def _check_cast(scales: torch.Tensor, dtype: torch.dtype) -> None:
    """bfloat16's range is float32's; float16's is not, at neither end."""
    if dtype != torch.float16 or scales.dtype == dtype:
        return
    wrong = int((scales.to(dtype).float() != scales.float()).sum())
    if wrong:
        raise NotTheSameNumbersError(
            f"{wrong:,} of its {scales.numel():,} scales are no float16 numbers",
            "start with --dtype bfloat16",
        )


def _check_order(integers: _Integers, stored: StoredFormat, scheme: Scheme) -> None:
    if integers.g_idx is None or scheme.arguments.get("desc_act"):
        return
    group_size = resolve_group_size(stored.K, stored.dequantizer_arguments["group_size"], 1)
    if not torch.equal(integers.g_idx, _plain_order(stored.K, group_size)):
        remedy = "write desc_act: true" if scheme.method == stored.family else _DEQUANTIZE
        raise NotTheSameNumbersError("its groups are in act order", remedy)


def _plain_order(K: int, group_size: int) -> torch.Tensor:
    return torch.arange(K, dtype=torch.int32) // group_size


def _read_awq(tensors: Tensors, _stored: StoredFormat) -> _Integers:
    def codes(rows: slice) -> torch.Tensor:
        words = slice(rows.start // AWQ_PACK_FACTOR, rows.stop // AWQ_PACK_FACTOR)
        return unpack_awq(tensors["qweight"][:, words])

    zeros = unpack_awq(tensors["qzeros"]).to(torch.int16)
    return _Integers(codes, zeros, tensors["scales"].t(), None)


def _read_gptq(tensors: Tensors, stored: StoredFormat) -> _Integers:
    bits = stored.dequantizer_arguments["bits"]
    zeros = unpack(tensors["qzeros"], bits).t().to(torch.int16)
    if stored.dequantizer_arguments["checkpoint_format"] != "gptq_v2":
        zeros = zeros + 1
    g_idx = tensors.get("g_idx")
    return _Integers(
        lambda rows: unpack(tensors["qweight"][:, rows].t(), bits),
        zeros,
        tensors["scales"].t(),
        g_idx.to(torch.int32) if g_idx is not None else None,
    )


def _read_pack_quantized(tensors: Tensors, stored: StoredFormat) -> _Integers:
    bits = stored.dequantizer_arguments["bits"]
    middle, scales = 1 << (bits - 1), tensors["weight_scale"]
    shape = tensors.get("weight_shape")
    if shape is not None and shape.tolist() != [stored.N, stored.K]:
        raise NotTheSameNumbersError(
            f"its weight_shape is {shape.tolist()} (expected {[stored.N, stored.K]})",
            "the checkpoint is damaged; download it again",
        )
    packed_zeros = tensors.get("weight_zero_point")
    if packed_zeros is None:
        zeros = torch.full(scales.shape, middle, dtype=torch.int16)
    elif packed_zeros.dtype == torch.int8:
        zeros = packed_zeros.to(torch.int16) + middle
    else:
        zeros = unpack(packed_zeros.t(), bits).t()[: stored.N].to(torch.int16)
    g_idx = tensors.get("weight_g_idx")
    # the library writes -1 where groups were never ordered
    is_ordered = g_idx is None or int(g_idx.min()) == -1
    return _Integers(
        lambda rows: unpack(tensors["weight_packed"][rows], bits),
        zeros,
        scales,
        None if g_idx is None or is_ordered else g_idx.to(torch.int32),
    )


_READERS: Mapping[str, Callable[[Tensors, StoredFormat], _Integers]] = {
    "awq": _read_awq, "gptq": _read_gptq, "pack-quantized": _read_pack_quantized
}  # fmt: skip


def _write_awq(
    integers: _Integers, stored: StoredFormat, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    low, high = (int(value) for value in torch.aminmax(integers.zeros))
    if low < 0 or high > 15:
        raise NotTheSameNumbersError(
            f"it has a zero point of {low if low < 0 else high} (expected 0..15)", _DEQUANTIZE
        )
    N, K = stored.N, stored.K
    qweight = torch.empty((K, N // AWQ_PACK_FACTOR), dtype=torch.int32)
    for rows in row_chunks(N, K, multiple=AWQ_PACK_FACTOR):
        words = slice(rows.start // AWQ_PACK_FACTOR, rows.stop // AWQ_PACK_FACTOR)
        qweight[:, words] = pack_awq(integers.codes(rows))
    return {
        "qweight": qweight,
        "qzeros": pack_awq(integers.zeros.to(torch.uint8)).contiguous(),
        "scales": integers.scales.t().to(dtype).contiguous(),
    }


def _write_gptq(
    integers: _Integers, stored: StoredFormat, scheme: Scheme, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    bits: int = scheme.arguments["bits"]
    N, K = stored.N, stored.K
    middle = 1 << (bits - 1)
    odd = int((integers.zeros != middle).sum())
    if odd:
        raise NotTheSameNumbersError(
            f"{odd:,} of its {integers.zeros.numel():,} zero points are not {middle}, "
            "and gptq is served symmetric only",
            _DEQUANTIZE if scheme.requantize else _REQUANTIZE,
        )
    qweight = torch.empty((K * bits // 32, N), dtype=torch.int32)
    for rows in row_chunks(N, K):
        qweight[:, rows] = pack(integers.codes(rows), bits).t()
    group_size = resolve_group_size(K, stored.dequantizer_arguments["group_size"], 1)
    zeros = torch.full((K // group_size, N), middle - 1, dtype=torch.uint8)
    g_idx = integers.g_idx if scheme.arguments["desc_act"] else None
    return {
        "qweight": qweight,
        "qzeros": pack(zeros, bits),
        "scales": integers.scales.t().to(dtype).contiguous(),
        "g_idx": g_idx if g_idx is not None else _plain_order(K, group_size),
    }
