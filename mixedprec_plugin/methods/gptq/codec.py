"""GPTQ's stored form: 4- or 8-bit codes packed along K: w ~= (q - zero) * scale.

Only the form is GPTQ's: weights are rounded to nearest, not calibrated.
`qzeros` hold zero - 1 in format v1 (the usual one, and what is written here) and zero in v2
(`checkpoint_format: gptq_v2`). A stored 15 in v1 reads as 16.
Source: AutoGPTQ and GPTQModel `QuantLinear.pack` and `dequantize_weight`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mixedprec_plugin.errors import MethodError, Problem
from mixedprec_plugin.quantize.checks import (
    refuse,
    require_finite,
    require_packable,
    resolve_group_size,
    take,
    take_matrix,
    weight_shape,
)
from mixedprec_plugin.quantize.chunks import float_chunks, row_chunks
from mixedprec_plugin.quantize.packing import pack, unpack
from mixedprec_plugin.quantize.rounding import Grid, round_groups


def quantize(
    weight: torch.Tensor, arguments: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Quantize a weight to group-wise unsigned integers, symmetric, GPTQ v1 layout.

    Args:
        weight: [N, K], floating point, any device; not modified.
        arguments: "bits" (4 or 8), "group_size" (divides K; -1 for all of K), "clip_search".
        dtype: the running model's dtype, which scales are stored in.
    Returns:
        "qweight" int32 [K/(32/bits), N], "qzeros" int32 [K/G, N/(32/bits)] holding zero - 1,
        "scales" [K/G, N] of `dtype`, some of them negative, "g_idx" int32 [K], the group of every
        input feature; weight ~= (q - 2**(bits-1)) * scale.
    Raises:
        ShapeError: not a matrix of floats, not finite, too large for `dtype`, K no multiple of the
            group size, or N or K no multiple of 32 / bits.
        MethodError: zero points or an activation order were asked for, which a weight cannot give.
    """
    _require_plain(arguments)
    bits = int(arguments["bits"])
    pack_factor = 32 // bits
    N, K = weight_shape(weight)
    require_packable(N, pack_factor)
    group_size = resolve_group_size(K, arguments["group_size"], pack_factor)
    num_groups = K // group_size
    grid = Grid(bits=bits, symmetric=True, scale_dtype=dtype)
    qweight = torch.empty((K // pack_factor, N), dtype=torch.int32, device=weight.device)
    scales = torch.empty((num_groups, N), dtype=dtype, device=weight.device)
    clip_search = bool(arguments.get("clip_search", False))
    for rows, values in float_chunks(weight):
        codes, scale, _ = round_groups(values, group_size, grid, clip_search)
        qweight[:, rows] = pack(codes, bits).t()
        scales[:, rows] = scale.t()
    require_finite(scales, weight)
    stored_zero = (1 << (bits - 1)) - 1
    zeros = torch.full((num_groups, N), stored_zero, dtype=torch.uint8, device=weight.device)
    return {
        "qweight": qweight,
        "qzeros": pack(zeros, bits),
        "scales": scales,
        "g_idx": _plain_order(K, group_size, weight.device),
    }


def dequantize(tensors: Mapping[str, torch.Tensor], arguments: Mapping[str, Any]) -> torch.Tensor:
    """Dequantize any GPTQ layer: symmetric or not, v1 or v2, with or without activation order.

    Args:
        tensors: "qweight" int32 [K/(32/bits), N], "qzeros" int32 [K/G, N/(32/bits)], "scales"
            [K/G, N] of any floating dtype, and "g_idx" int32 [K], the group of every input feature,
            which may be missing where groups are in order; not modified.
        arguments: "bits", "group_size", and optionally "checkpoint_format" ("gptq" or "gptq_v2").
    Returns:
        float32 [N, K], exactly (q - zero) * scale.
    Raises:
        ShapeError: a tensor is missing or of another shape, K no multiple of the group size, or
            g_idx names a group that is not there.
    """
    bits = int(arguments["bits"])
    pack_factor = 32 // bits
    qweight = take_matrix(tensors, "qweight", torch.int32, f"[K/{pack_factor}, N]")
    K, N = qweight.shape[0] * pack_factor, qweight.shape[1]
    group_size = resolve_group_size(K, arguments["group_size"], pack_factor)
    num_groups = K // group_size
    scales = take(tensors, "scales", (num_groups, N)).t().float()
    zeros = unpack(take(tensors, "qzeros", (num_groups, N // pack_factor)), bits).t().float()
    if arguments.get("checkpoint_format") != "gptq_v2":
        zeros = zeros + 1
    order = _take_order(tensors, K, group_size, num_groups)
    weight = torch.empty((N, K), device=qweight.device)
    for rows in row_chunks(N, K):
        chunk = weight[rows].copy_(unpack(qweight[:, rows].t(), bits))
        if order is None:
            grouped = chunk.view(-1, num_groups, group_size)
            grouped.sub_(zeros[rows, :, None]).mul_(scales[rows, :, None])
        else:
            chunk.sub_(zeros[rows][:, order]).mul_(scales[rows][:, order])
    return weight


def _require_plain(arguments: Mapping[str, Any]) -> None:
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


def _plain_order(K: int, group_size: int, device: torch.device) -> torch.Tensor:
    """Return the group of every input feature when groups are in order."""
    return torch.arange(K, dtype=torch.int32, device=device) // group_size


def _take_order(
    tensors: Mapping[str, torch.Tensor], K: int, group_size: int, num_groups: int
) -> torch.Tensor | None:
    """Return g_idx as an index, or None where groups are in order."""
    if "g_idx" not in tensors:
        return None
    g_idx = take(tensors, "g_idx", (K,))
    if torch.equal(g_idx.int(), _plain_order(K, group_size, g_idx.device)):
        return None
    low, high = g_idx.min().item(), g_idx.max().item()
    if low < 0 or high >= num_groups:
        refuse(
            "g_idx",
            f"groups {low}..{high} (expected 0..{num_groups - 1})",
            "check group_size against the checkpoint",
            "g-idx",
        )
    return g_idx.long()
