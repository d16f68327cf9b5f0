"""INT8 weights, symmetric, with one scale for each block: W = q * weight_scale_inv.

Source: SGLang's `BlockInt8LinearMethod`, whose checkpoints follow DeepSeek's block FP8 naming.
"""

from __future__ import annotations

import torch

from mixedprec_plugin.cpu.activation import quantize_int8_groups
from mixedprec_plugin.quantize.codec import Arguments, Tensors
from mixedprec_plugin.quantize.scaled import TileCodec

_CODEC = TileCodec(
    torch.int8, lambda arguments: ("weight_scale_inv", (*arguments["weight_block_size"],))
)
quantize, read, write, grid = _CODEC.quantize, _CODEC.read, _CODEC.write, _CODEC.grid


def round_inputs(inputs: torch.Tensor, _tensors: Tensors, arguments: Arguments) -> torch.Tensor:
    """INT8 with a scale for each token and block along K."""
    size = arguments["weight_block_size"][1]
    codes, scales = quantize_int8_groups(inputs, size)
    return codes.float() * scales.repeat_interleave(size, dim=1)
