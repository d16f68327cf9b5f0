"""FP8 e4m3 weights with one scale for each output channel: W = q * weight_scale.

Source: llm-compressor's FP8-dynamic (compressed-tensors' float-quantized, strategy channel) and
SGLang's `W8A8Fp8LinearMethod`.
"""

from __future__ import annotations

import torch

from mixedprec_plugin.cpu.activation import quantize_fp8_tokens
from mixedprec_plugin.quantize.codec import Arguments, Tensors
from mixedprec_plugin.quantize.scaled import E4M3, TileCodec

_CODEC = TileCodec(E4M3, lambda _arguments: ("weight_scale", (1, None)))
quantize, read, write, grid = _CODEC.quantize, _CODEC.read, _CODEC.write, _CODEC.grid


def round_inputs(inputs: torch.Tensor, _tensors: Tensors, _arguments: Arguments) -> torch.Tensor:
    """FP8 with a scale for each token."""
    codes, scales = quantize_fp8_tokens(inputs)
    return codes.float() * scales
