"""INT8 weights, symmetric, with one scale for each output channel: W = q * weight_scale.

Source: llm-compressor's W8A8 (compressed-tensors' int-quantized, strategy channel) and SGLang's
`W8A8Int8LinearMethod`.
"""

from __future__ import annotations

import torch

from mixedprec_plugin.cpu.activation import quantize_int8_tokens
from mixedprec_plugin.quantize.codec import Arguments, Tensors
from mixedprec_plugin.quantize.scaled import TileCodec

_CODEC = TileCodec(torch.int8, lambda _arguments: ("weight_scale", (1, None)))
quantize, read, write, grid = _CODEC.quantize, _CODEC.read, _CODEC.write, _CODEC.grid


def round_inputs(inputs: torch.Tensor, _tensors: Tensors, _arguments: Arguments) -> torch.Tensor:
    """INT8 with a scale for each token."""
    codes, scales = quantize_int8_tokens(inputs)
    return codes.float() * scales
