"""FP8 e4m3 weights with one scale for each output channel: W = q * weight_scale.

Source: llm-compressor's FP8-dynamic (compressed-tensors' float-quantized, strategy channel) and
SGLang's `W8A8Fp8LinearMethod`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mixedprec_plugin.methods.fp8.codec import E4M3, E4M3_MAX, decode
from mixedprec_plugin.quantize.blocks import SMALLEST_SCALE
from mixedprec_plugin.quantize.checks import require_finite, take, take_matrix, weight_shape
from mixedprec_plugin.quantize.chunks import float_chunks, row_chunks


def quantize(
    weight: torch.Tensor, _arguments: Mapping[str, Any], _dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Quantize a weight to FP8 e4m3, rounding to nearest, ties to even.

    Args:
        weight: [N, K], floating point, any device; not modified.
    Returns:
        "weight" float8_e4m3fn [N, K], "weight_scale" float32 [N, 1], a row's largest magnitude /
        448. No clamping is needed, see `blocks.quantize_blocks`.
    Raises:
        ShapeError: not a matrix of floats, or not finite.
    """
    N, K = weight_shape(weight)
    codes = torch.empty((N, K), dtype=E4M3, device=weight.device)
    scales = torch.empty((N, 1), device=weight.device)
    for rows, values in float_chunks(weight):
        low, high = torch.aminmax(values, dim=1, keepdim=True)
        top = torch.maximum(high, -low)
        scales[rows] = (top / E4M3_MAX).clamp_(min=SMALLEST_SCALE)
        codes[rows].copy_(values.div_(scales[rows]))
    require_finite(scales, weight)
    return {"weight": codes, "weight_scale": scales}


def dequantize(tensors: Mapping[str, torch.Tensor], _arguments: Mapping[str, Any]) -> torch.Tensor:
    """Undo `quantize`.

    Args:
        tensors: "weight" float8_e4m3fn [N, K], "weight_scale" [N, 1] of any floating dtype; not
            modified.
    Returns:
        float32 [N, K], q * scale rounded once.
    Raises:
        ShapeError: a tensor is missing, or of another shape or dtype.
    """
    codes = take_matrix(tensors, "weight", E4M3, "[N, K]")
    N, K = codes.shape
    scales = take(tensors, "weight_scale", (N, 1)).float()
    weight = torch.empty((N, K), device=codes.device)
    for rows in row_chunks(N, K):
        decode(codes[rows], weight[rows])
        weight[rows].mul_(scales[rows])
    return weight
