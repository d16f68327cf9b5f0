"""NVFP4 as ModelOpt stores it: W = q * weight_scale * weight_scale_2.

weight           uint8 [N, K/2]
weight_scale     e4m3 [N, K/16]
weight_scale_2   float32 []; what is quantized here has a power of two
input_scale      float32 [], where activations were quantized
"""

from __future__ import annotations

import torch

from mixedprec_plugin.methods.nvfp4 import GROUP_SIZE
from mixedprec_plugin.quantize.checks import take, take_matrix, take_one
from mixedprec_plugin.quantize.codec import Arguments, Numbers, TensorDict, Tensors
from mixedprec_plugin.quantize.fp4 import E4M3, Fp4, Fp4Tiles, packed_tiles, quantize_blocks
from mixedprec_plugin.quantize.scaled import Scaled


def quantize(weight: torch.Tensor, _arguments: Arguments, _dtype: torch.dtype) -> TensorDict:
    """Quantize a weight to FP4, each block with the scale of least squared error."""
    packed, scales, whole = quantize_blocks(weight, GROUP_SIZE)
    return {"weight": packed, "weight_scale": scales, "weight_scale_2": whole}


def grid(_arguments: Arguments, _dtype: torch.dtype) -> Fp4Tiles:
    return Fp4Tiles(E4M3, 1, GROUP_SIZE)


def read(tensors: Tensors, _arguments: Arguments) -> Fp4:
    packed = take_matrix(tensors, "weight", torch.uint8, "[N, K/2]")
    scales = take_matrix(tensors, "weight_scale", torch.float8_e4m3fn, "[N, K/16]")
    N, K = packed.shape[0], 2 * packed.shape[1]
    take(tensors, "weight_scale", (N, K // GROUP_SIZE))
    inputs = take_one(tensors, "input_scale") if "input_scale" in tensors else None
    return Fp4(packed, scales, take_one(tensors, "weight_scale_2"), inputs)


def write(numbers: Numbers, arguments: Arguments, _dtype: torch.dtype) -> TensorDict:
    """Store numbers, or what was rounded on `grid`, as ModelOpt does; input scales where kept."""
    if isinstance(numbers, Scaled):
        numbers = packed_tiles(numbers)
    assert isinstance(numbers, Fp4)
    made = {
        "weight": numbers.packed,
        "weight_scale": numbers.scales,
        "weight_scale_2": numbers.global_scale,
    }
    if arguments["keep_input_scale"]:
        assert numbers.input_scale is not None
        made["input_scale"] = numbers.input_scale
    return made
