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
from mixedprec_plugin.quantize import scaled
from mixedprec_plugin.quantize.codec import Arguments, Numbers, TensorDict, Tensors
from mixedprec_plugin.quantize.rounding import Tiles


def quantize(weight: torch.Tensor, arguments: Arguments, _dtype: torch.dtype) -> TensorDict:
    """Quantize a weight to FP8 e4m3, ties to even.

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
    if block := arguments.get("weight_block_size"):
        return scaled.quantize_blocks(weight, block, scaled.E4M3)
    return scaled.quantize_whole(weight, scaled.E4M3)


def grid(arguments: Arguments, _dtype: torch.dtype) -> Tiles:
    """Codes with a scale for each of the method's tiles."""
    return Tiles(scaled.E4M3, *(arguments["weight_block_size"] or (None, None)))


def read(tensors: Tensors, arguments: Arguments) -> scaled.Scaled:
    """Tell the numbers of "weight" and "weight_scale", or "weight_scale_inv" in blocks.

    Raises:
        ShapeError: a tensor is missing, or of another shape or dtype.
    """
    if block := arguments.get("weight_block_size"):
        return scaled.read_codes(tensors, scaled.E4M3, "weight_scale_inv", block)
    return scaled.read_codes(tensors, scaled.E4M3, "weight_scale", (None, None))


def write(numbers: Numbers, arguments: Arguments, _dtype: torch.dtype) -> TensorDict:
    """Store the codes as they are, and scales under SGLang's name, in float32, which holds all."""
    assert isinstance(numbers, scaled.Scaled)
    made = {"weight": numbers.codes}
    if arguments["weight_block_size"] is None:
        made["weight_scale"] = numbers.scales.view(())
    else:
        made["weight_scale_inv"] = numbers.scales
    if numbers.input_scale is not None:
        made["input_scale"] = numbers.input_scale.float().view(())
    return made


def round_inputs(inputs: torch.Tensor, tensors: Tensors, arguments: Arguments) -> torch.Tensor:
    """FP8 with a scale a token, or a token and a block along K; or with the stored scale."""
    if block := arguments.get("weight_block_size"):
        codes, scales = quantize_fp8_groups(inputs, block[1])
        return codes.float() * scales.repeat_interleave(block[1], dim=1)
    if (scale := tensors.get("input_scale")) is not None:
        return quantize_fp8_static(inputs, scale.float()).float() * scale.float()
    codes, scales = quantize_fp8_tokens(inputs)
    return codes.float() * scales
