"""INT8 weights, symmetric, with one scale for each block: W = q * weight_scale_inv.

Source: SGLang's `BlockInt8LinearMethod`, whose checkpoints follow DeepSeek's block FP8 naming.
"""

from __future__ import annotations

import torch

from mixedprec_plugin.cpu.activation import quantize_int8_groups
from mixedprec_plugin.quantize.codec import Arguments, Numbers, TensorDict, Tensors
from mixedprec_plugin.quantize.rounding import Tiles
from mixedprec_plugin.quantize.scaled import Scaled, quantize_blocks, read_codes


def quantize(weight: torch.Tensor, arguments: Arguments, _dtype: torch.dtype) -> TensorDict:
    """Quantize a weight to INT8 in blocks, ties to even.

    Returns:
        "weight" int8 [N, K] in -127..127, "weight_scale_inv" float32 [ceil(N/bn), ceil(K/bk)],
        a block's largest magnitude / 127.
    Raises:
        ShapeError: not a matrix of floats, or not finite.
    """
    return quantize_blocks(weight, arguments["weight_block_size"], torch.int8)


def grid(arguments: Arguments, _dtype: torch.dtype) -> Tiles:
    """Codes with a scale for each of the method's tiles."""
    return Tiles(torch.int8, *arguments["weight_block_size"])


def read(tensors: Tensors, arguments: Arguments) -> Scaled:
    """Tell the numbers of "weight" int8 [N, K] and "weight_scale_inv" [ceil(N/bn), ceil(K/bk)].

    Raises:
        ShapeError: a tensor is missing, or of another shape or dtype.
    """
    return read_codes(tensors, torch.int8, "weight_scale_inv", arguments["weight_block_size"])


def write(numbers: Numbers, _arguments: Arguments, _dtype: torch.dtype) -> TensorDict:
    """Store codes and scales as they are, under SGLang's names, scales in float32."""
    assert isinstance(numbers, Scaled)
    return {"weight": numbers.codes, "weight_scale_inv": numbers.scales}


def round_inputs(inputs: torch.Tensor, _tensors: Tensors, arguments: Arguments) -> torch.Tensor:
    """INT8 with a scale for each token and block along K."""
    size = arguments["weight_block_size"][1]
    codes, scales = quantize_int8_groups(inputs, size)
    return codes.float() * scales.repeat_interleave(size, dim=1)
