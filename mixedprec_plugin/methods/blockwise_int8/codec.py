"""INT8 weights, symmetric, with one scale for each block: W = q * weight_scale_inv.

Source: SGLang's `BlockInt8LinearMethod`, whose checkpoints follow DeepSeek's block FP8 naming.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mixedprec_plugin.quantize.checks import take_matrix
from mixedprec_plugin.quantize.codec import Numbers, Tensors
from mixedprec_plugin.quantize.scaled import Scaled, quantize_blocks, read_codes

INT8_MAX = 127.0


def quantize(
    weight: torch.Tensor, arguments: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Quantize a weight to INT8 in blocks, rounding to nearest, ties to even.

    Args:
        weight: [N, K], floating point, any device; not modified.
        arguments: "weight_block_size", [block_n, block_k].
        dtype: the running model's dtype; scales are float32 whatever it is.
    Returns:
        "weight" int8 [N, K] in -127..127, "weight_scale_inv" float32 [ceil(N/bn), ceil(K/bk)],
        a block's largest magnitude / 127.
    Raises:
        ShapeError: not a matrix of floats, or not finite.
    """
    block_n, block_k = arguments["weight_block_size"]
    return quantize_blocks(weight, (block_n, block_k), INT8_MAX, _encode, torch.int8)


def read(tensors: Tensors, arguments: Mapping[str, Any]) -> Scaled:
    """Tell the numbers of "weight" int8 [N, K] and "weight_scale_inv" [ceil(N/bn), ceil(K/bk)].

    Raises:
        ShapeError: a tensor is missing, or of another shape or dtype.
    """
    block_n, block_k = arguments["weight_block_size"]
    take_matrix(tensors, "weight", torch.int8, "[N, K]")
    return read_codes(tensors, "weight_scale_inv", (block_n, block_k))


def write(
    numbers: Numbers, _arguments: Mapping[str, Any], _dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Store codes and scales as they are, under SGLang's names, scales in float32."""
    assert isinstance(numbers, Scaled)
    return {"weight": numbers.codes, "weight_scale_inv": numbers.scales}


def _encode(scaled: torch.Tensor, codes: torch.Tensor) -> None:
    """Round to the nearest integer."""
    codes.copy_(scaled.round_())
