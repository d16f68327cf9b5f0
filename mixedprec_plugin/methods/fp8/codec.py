"""FP8 e4m3 weights, with one scale for the tensor or one for each block: W = q * scale.

Source: DeepSeek-V3's block format (`weight_scale_inv`, which multiplies in spite of its name) and
SGLang's per-tensor `Fp8LinearMethod` (`weight_scale`).
"""

from __future__ import annotations

import torch

from mixedprec_plugin.cpu.activation import (
    quantize_fp8_groups,
    quantize_fp8_static,
    quantize_fp8_tokens,
)
from mixedprec_plugin.errors import MethodError, Problem
from mixedprec_plugin.quantize.codec import Arguments, TensorDict, Tensors
from mixedprec_plugin.quantize.scaled import E4M3, Block, TileCodec


def _layout(arguments: Arguments) -> tuple[str, Block]:
    if block := arguments.get("weight_block_size"):
        return "weight_scale_inv", tuple(block)
    return "weight_scale", (None, None)


_CODEC = TileCodec(E4M3, _layout)
read, write, grid = _CODEC.read, _CODEC.write, _CODEC.grid


def quantize(weight: torch.Tensor, arguments: Arguments, dtype: torch.dtype) -> TensorDict:
    """Quantize a weight; see `TileCodec`.

    Raises:
        MethodError: static activation scales, which only a calibrated checkpoint has.
    """
    if (asked := arguments.get("activation_scheme", "dynamic")) != "dynamic":
        what = f"{asked!r} needs an input_scale, which no weight gives"
        remedy = "use activation_scheme: dynamic, or take the layer from a source that stores it"
        raise MethodError(Problem("activation_scheme", what, remedy, "static-activations"))
    return _CODEC.quantize(weight, arguments, dtype)


def round_inputs(inputs: torch.Tensor, tensors: Tensors, arguments: Arguments) -> torch.Tensor:
    """FP8 with a scale a token, or a token and a block along K; or with the stored scale."""
    if block := arguments.get("weight_block_size"):
        codes, scales = quantize_fp8_groups(inputs, block[1])
        return codes.float() * scales.repeat_interleave(block[1], dim=1)
    if (scale := tensors.get("input_scale")) is not None:
        return quantize_fp8_static(inputs, scale.float()).float() * scale.float()
    codes, scales = quantize_fp8_tokens(inputs)
    return codes.float() * scales
