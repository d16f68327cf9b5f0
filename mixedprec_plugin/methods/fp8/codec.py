"""FP8 e4m3 weights, with one scale for the tensor or one for each block: W = q * scale.

Source: DeepSeek-V3's block format (`weight_scale_inv`, which multiplies in spite of its name) and
SGLang's per-tensor `Fp8LinearMethod` (`weight_scale`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mixedprec_plugin.errors import MethodError, Problem
from mixedprec_plugin.quantize.checks import require_finite, take_matrix, weight_shape
from mixedprec_plugin.quantize.chunks import float_chunks
from mixedprec_plugin.quantize.codec import Numbers, Tensors
from mixedprec_plugin.quantize.scaled import (
    E4M3,
    E4M3_MAX,
    SMALLEST_SCALE,
    Scaled,
    quantize_blocks,
    read_codes,
)


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


def read(tensors: Tensors, arguments: Mapping[str, Any]) -> Scaled:
    """Tell the numbers of "weight" and "weight_scale", or "weight_scale_inv" in blocks.

    Args:
        arguments: as for `quantize`.
    Raises:
        ShapeError: a tensor is missing, or of another shape or dtype.
    """
    codes = take_matrix(tensors, "weight", E4M3, "[N, K]")
    block = arguments.get("weight_block_size")
    if block is None:
        return read_codes(tensors, "weight_scale", tuple(codes.shape))
    return read_codes(tensors, "weight_scale_inv", (block[0], block[1]))


def write(
    numbers: Numbers, arguments: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Store the codes as they are, and scales under SGLang's name, in float32, which holds all."""
    assert isinstance(numbers, Scaled)
    made = {"weight": numbers.codes}
    if arguments["weight_block_size"] is None:
        made["weight_scale"] = numbers.scales.view(())
    else:
        made["weight_scale_inv"] = numbers.scales
    if numbers.input_scale is not None:
        made["input_scale"] = numbers.input_scale.float().view(())
    return made


def _encode(scaled: torch.Tensor, codes: torch.Tensor) -> None:
    """Round to the nearest e4m3."""
    codes.copy_(scaled)
