"""FP8 e4m3 weights with one scale for each output channel: W = q * weight_scale.

Source: llm-compressor's FP8-dynamic (compressed-tensors' float-quantized, strategy channel) and
SGLang's `W8A8Fp8LinearMethod`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mixedprec_plugin.quantize.checks import require_finite, take_matrix, weight_shape
from mixedprec_plugin.quantize.chunks import float_chunks
from mixedprec_plugin.quantize.codec import Numbers, Tensors
from mixedprec_plugin.quantize.scaled import E4M3, E4M3_MAX, SMALLEST_SCALE, Scaled, read_codes


def quantize(
    weight: torch.Tensor, _arguments: Mapping[str, Any], _dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Quantize a weight to FP8 e4m3, rounding to nearest, ties to even.

    Args:
        weight: [N, K], floating point, any device; not modified.
    Returns:
        "weight" float8_e4m3fn [N, K], "weight_scale" float32 [N, 1], a row's largest magnitude /
        448. No clamping is needed, see `scaled.quantize_blocks`.
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


def read(tensors: Tensors, _arguments: Mapping[str, Any]) -> Scaled:
    """Tell the numbers of "weight" e4m3 [N, K] and "weight_scale" [N, 1].

    Raises:
        ShapeError: a tensor is missing, or of another shape or dtype.
    """
    codes = take_matrix(tensors, "weight", E4M3, "[N, K]")
    return read_codes(tensors, "weight_scale", (1, codes.shape[1]))


def write(
    numbers: Numbers, _arguments: Mapping[str, Any], _dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Store the codes as they are; one scale for all becomes every channel's."""
    assert isinstance(numbers, Scaled)
    scales = numbers.scales.expand(numbers.codes.shape[0], 1).contiguous()
    return {"weight": numbers.codes, "weight_scale": scales}
