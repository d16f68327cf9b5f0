"""Dequantize compressed-tensors' pack-quantized: 4- or 8-bit integers packed along K.

Codes and packed zero points are stored with 2**(bits-1) added; in their difference it cancels.
Source: compressed-tensors `PackedQuantizationCompressor` and `pack_to_int32`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mixedprec_plugin.quantize.checks import refuse, resolve_group_size, take, take_matrix
from mixedprec_plugin.quantize.chunks import row_chunks
from mixedprec_plugin.quantize.packing import unpack


def dequantize(tensors: Mapping[str, torch.Tensor], arguments: Mapping[str, Any]) -> torch.Tensor:
    """Dequantize a pack-quantized weight, symmetric or not, in any order of groups.

    Args:
        tensors: "weight_packed" int32 [N, K/(32/bits)], "weight_scale" [N, K/G] of any floating
            dtype, and optionally "weight_shape" int64 [2], "weight_zero_point" int32
            [ceil(N/(32/bits)), K/G] packed along N or int8 [N, K/G], "weight_g_idx" int32 [K]; not
            modified.
        arguments: "bits" (4 or 8), "group_size" (-1 for all of K).
    Returns:
        float32 [N, K], exactly (q - zero) * scale.
    Raises:
        ShapeError: a tensor is missing or of another shape, or K is not whole words or groups.
    """
    bits = int(arguments["bits"])
    packed = take_matrix(tensors, "weight_packed", torch.int32, f"[N, K/{32 // bits}]")
    N, K = packed.shape[0], packed.shape[1] * 32 // bits
    group_size = resolve_group_size(K, arguments["group_size"], 32 // bits)
    num_groups = K // group_size
    _check_shape(tensors, N, K)
    scales = take(tensors, "weight_scale", (N, num_groups)).float()
    zeros = _zeros(tensors, bits, (N, num_groups))
    order = _order(tensors, K, num_groups)
    weight = torch.empty((N, K), device=packed.device)
    for rows in row_chunks(N, K):
        chunk = weight[rows].copy_(unpack(packed[rows], bits))
        if order is None:
            grouped = chunk.view(-1, num_groups, group_size)
            grouped.sub_(zeros[rows, :, None]).mul_(scales[rows, :, None])
        else:
            chunk.sub_(zeros[rows][:, order]).mul_(scales[rows][:, order])
    return weight


def _zeros(tensors: Mapping[str, torch.Tensor], bits: int, shape: tuple[int, int]) -> torch.Tensor:
    """Return the codes' zero points as floats, [N, K/G]."""
    middle = float(1 << (bits - 1))
    zeros = tensors.get("weight_zero_point")
    if zeros is None:
        return torch.full(shape, middle, device=tensors["weight_scale"].device)
    if zeros.dtype == torch.int8:
        return take(tensors, "weight_zero_point", shape).float() + middle
    words = take(tensors, "weight_zero_point", (-(-shape[0] * bits // 32), shape[1]))
    return unpack(words.t(), bits).t()[: shape[0]].float()


def _order(tensors: Mapping[str, torch.Tensor], K: int, num_groups: int) -> torch.Tensor | None:
    """Return the group of every input feature, or None where groups are in order."""
    if "weight_g_idx" not in tensors:
        return None
    g_idx = take(tensors, "weight_g_idx", (K,)).long()
    low, high = int(g_idx.min()), int(g_idx.max())
    # the library writes -1 where groups were never ordered
    if low == -1:
        return None
    if low < 0 or high >= num_groups:
        refuse(
            "weight_g_idx",
            f"groups {low}..{high} (expected 0..{num_groups - 1})",
            "check group_size against the checkpoint",
            "g-idx",
        )
    return g_idx


def _check_shape(tensors: Mapping[str, torch.Tensor], N: int, K: int) -> None:
    """Refuse a weight whose last word is partly filled."""
    shape = tensors.get("weight_shape")
    if shape is not None and shape.tolist() != [N, K]:
        refuse(
            "weight_shape",
            f"{shape.tolist()} (expected {[N, K]}, what weight_packed holds)",
            "take the layer from a checkpoint in another format",
            "tensor-shape",
        )
