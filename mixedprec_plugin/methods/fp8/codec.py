"""FP8 e4m3 weights, with one scale for the tensor or one for each block: W = q * scale.

Source: DeepSeek-V3's block format (`weight_scale_inv`, which multiplies in spite of its name) and
SGLang's per-tensor `Fp8LinearMethod` (`weight_scale`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mixedprec_plugin.errors import MethodError, Problem
from mixedprec_plugin.quantize.blocks import (
    SMALLEST_SCALE,
    dequantize_blocks,
    quantize_blocks,
)
from mixedprec_plugin.quantize.checks import refuse, require_finite, take_matrix, weight_shape
from mixedprec_plugin.quantize.chunks import float_chunks, row_chunks

E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max


def quantize(
    weight: torch.Tensor, arguments: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Quantize a weight to FP8 e4m3, rounding to nearest, ties to even.

    Args:
        weight: [N, K], floating point, any device; not modified.
        arguments: "weight_block_size", None for one scale a tensor or [block_n, block_k].
        dtype: the running model's dtype; scales are float32 whatever it is.
    Returns:
        "weight" float8_e4m3fn [N, K], and "weight_scale" float32 [] (largest magnitude / 448) or
        "weight_scale_inv" float32 [ceil(N/bn), ceil(K/bk)].
    Raises:
        ShapeError: not a matrix of floats, or not finite.
        MethodError: static activation scales, which only a calibrated checkpoint has.
    """
    if arguments.get("activation_scheme", "dynamic") != "dynamic":
        raise MethodError(
            Problem(
                "activation_scheme",
                f"{arguments['activation_scheme']!r} needs an input_scale, which no weight gives",
                "use activation_scheme: dynamic, or take the layer from a source that stores it",
                "static-activations",
            )
        )
    block = arguments.get("weight_block_size")
    if block is not None:
        return quantize_blocks(weight, (block[0], block[1]), E4M3_MAX, _encode, E4M3)
    N, K = weight_shape(weight)
    low, high = torch.aminmax(weight)
    top = torch.maximum(high, -low).float()
    scale = (top / E4M3_MAX).clamp_(min=SMALLEST_SCALE)
    require_finite(scale, weight)
    codes = torch.empty((N, K), dtype=E4M3, device=weight.device)
    for rows, values in float_chunks(weight):
        _encode(values.div_(scale), codes[rows])
    return {"weight": codes, "weight_scale": scale}


def dequantize(tensors: Mapping[str, torch.Tensor], arguments: Mapping[str, Any]) -> torch.Tensor:
    """Undo `quantize`.

    Args:
        tensors: "weight" float8_e4m3fn [N, K], and "weight_scale_inv" [ceil(N/bn), ceil(K/bk)] in
            blocks, else "weight_scale" of one element, or of N, [N] or [N, 1], for one scale a
            channel; scales of any floating dtype; not modified.
        arguments: as for `quantize`.
    Returns:
        float32 [N, K], q * scale rounded once.
    Raises:
        ShapeError: a tensor is missing, or of another shape or dtype.
    """
    block = arguments.get("weight_block_size")
    if block is not None:
        return dequantize_blocks(tensors, (block[0], block[1]), decode, E4M3)
    codes = take_matrix(tensors, "weight", E4M3, "[N, K]")
    scale = tensors.get("weight_scale")
    if scale is None or scale.numel() not in (1, codes.shape[0]):
        found = "missing" if scale is None else f"shape {list(scale.shape)}"
        refuse(
            "weight_scale",
            f"{found} (expected one element, or {codes.shape[0]}, one a channel)",
            "check weight_block_size against the checkpoint",
            "tensor-shape",
        )
    N, K = codes.shape
    spread = scale.float().reshape(-1, 1).expand(N, 1)
    weight = torch.empty((N, K), device=codes.device)
    for rows in row_chunks(N, K):
        decode(codes[rows], weight[rows])
        weight[rows].mul_(spread[rows])
    return weight


def _encode(scaled: torch.Tensor, codes: torch.Tensor) -> None:
    """Round to the nearest e4m3."""
    codes.copy_(scaled)


def decode(codes: torch.Tensor, values: torch.Tensor) -> None:
    """Write e4m3 codes as floats, four times as fast as torch's own cast on a CPU.

    The seven bits below the sign, moved up by seven, are a float16 of 1/256 the value: e4m3's
    exponent is biased by 7, float16's by 15. Only e4m3's NaN would read as a number.
    """
    octets = codes.view(torch.int8)
    if bool(octets.bitwise_and(0x7F).amax() == 0x7F):
        values.copy_(codes)
        return
    halves = octets.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)
    values.copy_(halves.view(torch.float16)).mul_(256)
