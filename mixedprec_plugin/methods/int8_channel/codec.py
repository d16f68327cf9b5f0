"""INT8 weights, symmetric, with one scale for each output channel: W = q * weight_scale.

Source: llm-compressor's W8A8 (compressed-tensors' int-quantized, strategy channel) and SGLang's
`W8A8Int8LinearMethod`.
"""

from __future__ import annotations

import torch

from mixedprec_plugin.cpu.activation import quantize_int8_tokens
from mixedprec_plugin.quantize.codec import Arguments, Numbers, TensorDict, Tensors
from mixedprec_plugin.quantize.rounding import Tiles
from mixedprec_plugin.quantize.scaled import Scaled, quantize_channels, read_codes, write_channels


def quantize(weight: torch.Tensor, _arguments: Arguments, _dtype: torch.dtype) -> TensorDict:
    """Quantize a weight to INT8, ties to even.

    Returns:
        "weight" int8 [N, K] in -127..127, "weight_scale" float32 [N, 1], a row's largest
        magnitude / 127.
    Raises:
        ShapeError: not a matrix of floats, or not finite.
    """
    return quantize_channels(weight, torch.int8)


def grid(_arguments: Arguments, _dtype: torch.dtype) -> Tiles:
    """Codes with a scale for each of the method's tiles."""
    return Tiles(torch.int8, 1, None)


def read(tensors: Tensors, _arguments: Arguments) -> Scaled:
    """Tell the numbers of "weight" int8 [N, K] and "weight_scale" [N, 1].

    Raises:
        ShapeError: a tensor is missing, or of another shape or dtype.
    """
    return read_codes(tensors, torch.int8, "weight_scale", (1, None))


def write(numbers: Numbers, _arguments: Arguments, _dtype: torch.dtype) -> TensorDict:
    """Store the codes as they are; one scale for all becomes every channel's."""
    return write_channels(numbers)


def round_inputs(inputs: torch.Tensor, _tensors: Tensors, _arguments: Arguments) -> torch.Tensor:
    """INT8 with a scale for each token."""
    codes, scales = quantize_int8_tokens(inputs)
    return codes.float() * scales
