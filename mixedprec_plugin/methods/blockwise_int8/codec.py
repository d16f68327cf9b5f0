"""INT8 weights, symmetric, with one scale for each block: W = q * weight_scale_inv.

Source: SGLang's `BlockInt8LinearMethod`, whose checkpoints follow DeepSeek's block FP8 naming.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mixedprec_plugin.quantize.blocks import dequantize_blocks, quantize_blocks

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


def dequantize(tensors: Mapping[str, torch.Tensor], arguments: Mapping[str, Any]) -> torch.Tensor:
    """Undo `quantize`.

    Args:
        tensors: "weight" int8 [N, K], "weight_scale_inv" [ceil(N/bn), ceil(K/bk)] of any floating
            dtype; not modified.
        arguments: as for `quantize`.
    Returns:
        float32 [N, K], q * weight_scale_inv rounded once.
    Raises:
        ShapeError: a tensor is missing, or of another shape or dtype.
    """
    block_n, block_k = arguments["weight_block_size"]
    return dequantize_blocks(tensors, (block_n, block_k), _decode, torch.int8)


def _encode(scaled: torch.Tensor, codes: torch.Tensor) -> None:
    """Round to the nearest integer."""
    codes.copy_(scaled.round_())


def _decode(codes: torch.Tensor, values: torch.Tensor) -> None:
    """Write whole numbers as floats."""
    values.copy_(codes)
