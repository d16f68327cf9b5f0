"""NVFP4 as ModelOpt stores it: W = q * weight_scale * weight_scale_2.

weight           uint8 [N, K/2]
weight_scale     e4m3 [N, K/16]
weight_scale_2   float32 []; what is quantized here has a power of two
input_scale      float32 [], where activations were quantized
"""

from __future__ import annotations

import torch

from mixedprec_plugin.methods.nvfp4 import GROUP_SIZE
from mixedprec_plugin.quantize import fp4
from mixedprec_plugin.quantize.checks import take_one
from mixedprec_plugin.quantize.codec import Arguments, Numbers, TensorDict, Tensors
from mixedprec_plugin.quantize.scaled import Scaled


def quantize(weight: torch.Tensor, _arguments: Arguments, _dtype: torch.dtype) -> TensorDict:
    """Quantize a weight to FP4, each block with the scale of least squared error."""
    packed, scales, whole = fp4.quantize_blocks(weight, GROUP_SIZE)
    return {"weight": packed, "weight_scale": scales, "weight_scale_2": whole}


def grid(_arguments: Arguments, _dtype: torch.dtype) -> fp4.Fp4Tiles:
    return fp4.Fp4Tiles(fp4.E4M3, 1, GROUP_SIZE)


def read(tensors: Tensors, _arguments: Arguments) -> fp4.Fp4:
    packed, scales = fp4.take_blocks(tensors, "weight", fp4.E4M3, GROUP_SIZE)
    inputs = take_one(tensors, "input_scale") if "input_scale" in tensors else None
    return fp4.Fp4(packed, scales, take_one(tensors, "weight_scale_2"), inputs)


def write(numbers: Numbers, arguments: Arguments, _dtype: torch.dtype) -> TensorDict:
    """Store numbers, or what was rounded on `grid`, as ModelOpt does; input scales where kept."""
    if isinstance(numbers, Scaled):
        numbers = fp4.packed_tiles(numbers)
    assert isinstance(numbers, fp4.Fp4)
    made = {
        "weight": numbers.packed,
        "weight_scale": numbers.scales,
        "weight_scale_2": numbers.global_scale,
    }
    if arguments["keep_input_scale"]:
        assert numbers.input_scale is not None
        made["input_scale"] = numbers.input_scale
    return made
