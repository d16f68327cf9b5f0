"""Dequantizing of `quantize.scaled`, `.integers` and `.fp4`, compiled for a CPU: torch's bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mixedprec_plugin.quantize.compiled import e4m3_value
from mixedprec_plugin.quantize.loops import compiled, inlined, over_rows

Array = Any
_NAN = np.float32(np.nan)


def decode(
    codes: torch.Tensor,
    zeros: torch.Tensor | None,
    scales: torch.Tensor,
    block: tuple[int, int],
    weight: torch.Tensor,
) -> None:
    """Write (q - zero) * scale.

    Args:
        codes: int8, uint8 or float8_e4m3fn [N, K], contiguous.
        zeros, scales: float32 [ceil(N/bn), ceil(K/bk)]; no zeros are all 0.
        block: (bn, bk).
        weight: float32 [N, K], filled.
    """
    zeros = torch.zeros_like(scales) if zeros is None else zeros
    octets = codes.view(torch.uint8).numpy()
    arrays = (x.contiguous().numpy() for x in (zeros, scales))
    is_float, is_signed = codes.dtype == torch.float8_e4m3fn, codes.dtype == torch.int8
    over_rows(_decode, len(codes), octets, is_float, is_signed, *arrays, *block, weight.numpy())


def decode_in_order(
    codes: torch.Tensor,
    order: torch.Tensor,
    zeros: torch.Tensor,
    scales: torch.Tensor,
    weight: torch.Tensor,
) -> None:
    """As `decode`, of columns that each have a group.

    Args:
        order: int64 [K], the group of each column; each is there.
        zeros, scales: float32 [N, K/G].
    """
    arrays = (x.contiguous().numpy() for x in (codes, order, zeros, scales))
    over_rows(_decode_in_order, len(codes), *arrays, weight.numpy())


def decode_fp4(
    packed: torch.Tensor, scales: torch.Tensor, whole: torch.Tensor, weight: torch.Tensor
) -> None:
    """Write q * scale * whole: uint8 [N, K/2], float8 [N, K/G], one float32, to float32 [N, K]."""
    factors = scales.float().contiguous().numpy()
    over_rows(_decode_fp4, len(packed), packed.numpy(), factors, float(whole), weight.numpy())


@inlined
def _e4m3(code: Any) -> Any:
    magnitude = np.int32(code & np.int32(0x7F))
    value = _NAN if magnitude == 0x7F else e4m3_value(magnitude)
    sign = np.int32(np.int32(code & np.int32(0x80)) << 24)
    return np.int32(np.float32(value).view(np.int32) | sign).view(np.float32)


@compiled
def _decode(
    codes: Array, is_float: bool, is_signed: bool, zeros: Array, scales: Array, rows: int,
    columns: int, weight: Array, start: int, stop: int,
) -> None:  # fmt: skip
    """Decode bytes [N, K], with a zero and a scale for each `rows` by `columns`, for some rows."""
    # as many more, bytes with the highest bit turned are the signed ones
    turned, more = np.int32(128 * is_signed), np.float32(128 * is_signed)
    for row in range(start, stop):
        for tile in range(scales.shape[1]):
            zero, scale = zeros[row // rows, tile], scales[row // rows, tile]
            source = codes[row, tile * columns : (tile + 1) * columns]
            target = weight[row, tile * columns : (tile + 1) * columns]
            if is_float:
                for j in range(len(source)):
                    target[j] = (_e4m3(np.int32(source[j])) - zero) * scale
            else:
                for j in range(len(source)):
                    code = np.float32(np.int32(source[j]) ^ turned) - more
                    target[j] = (code - zero) * scale


@compiled
def _decode_in_order(
    codes: Array, order: Array, zeros: Array, scales: Array, weight: Array, start: int, stop: int
) -> None:
    """Decode bytes [N, K], with a zero and a scale for each column's group, for some rows."""
    for row in range(start, stop):
        source, target, zero, scale = codes[row], weight[row], zeros[row], scales[row]
        for j in range(len(source)):
            group = order[j]
            target[j] = (np.float32(source[j]) - zero[group]) * scale[group]


@inlined
def _e2m1(code: Any) -> Any:
    magnitude = np.int32(code & np.int32(7))
    normal = np.int32(np.int32(magnitude << 22) + np.int32(126 << 23)).view(np.float32)
    value = normal if magnitude >= 2 else np.float32(magnitude) * np.float32(0.5)
    sign = np.int32(np.int32(code & np.int32(8)) << 28)
    return np.int32(np.float32(value).view(np.int32) | sign).view(np.float32)


@compiled
def _decode_fp4(
    packed: Array, scales: Array, whole: float, weight: Array, start: int, stop: int
) -> None:
    """Decode nibbles [N, K/2], with a scale for each K / scales.shape[1], for some rows."""
    size = packed.shape[1] // scales.shape[1]
    last = np.float32(whole)
    for row in range(start, stop):
        for block in range(scales.shape[1]):
            scale = scales[row, block]
            source = packed[row, block * size : (block + 1) * size]
            target = weight[row, 2 * block * size : 2 * (block + 1) * size]
            for j in range(len(source)):
                pair = np.int32(source[j])
                target[2 * j] = _e2m1(pair) * scale * last
                target[2 * j + 1] = _e2m1(np.int32(pair >> 4)) * scale * last
