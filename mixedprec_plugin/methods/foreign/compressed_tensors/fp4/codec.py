"""compressed-tensors' FP4: NVFP4's scales of the whole are stored as reciprocals.

SGLang turns them round in float32 too (compressed_tensors_w4a16_nvfp4.py:214).
Source: compressed-tensors `NVFP4PackedCompressor`, and `generate_gparam` for the direction.
"""

from __future__ import annotations

import torch

from mixedprec_plugin.methods.mxfp4 import codec as mxfp4
from mixedprec_plugin.methods.nvfp4 import GROUP_SIZE
from mixedprec_plugin.quantize.checks import take_one
from mixedprec_plugin.quantize.codec import Arguments, Numbers, TensorDict, Tensors
from mixedprec_plugin.quantize.fp4 import E4M3, Fp4, take_blocks


def read(tensors: Tensors, _arguments: Arguments) -> Fp4:
    """Tell the numbers of a weight, NVFP4 or, without a global scale, MXFP4."""
    if "weight_global_scale" not in tensors:
        return mxfp4.numbers_of(tensors, "weight_packed")
    packed, scales = take_blocks(tensors, "weight_packed", E4M3, GROUP_SIZE)
    whole, inputs = take_one(tensors, "weight_global_scale").reciprocal(), None
    if "input_global_scale" in tensors:
        inputs = take_one(tensors, "input_global_scale").reciprocal()
    return Fp4(packed, scales, whole, inputs)


def write(numbers: Numbers, _arguments: Arguments, _dtype: torch.dtype) -> TensorDict:
    """Store NVFP4's numbers as `read` tells them."""
    assert isinstance(numbers, Fp4)
    made = {
        "weight_packed": numbers.packed,
        "weight_scale": numbers.scales,
        "weight_global_scale": numbers.global_scale.reciprocal().reshape(1),
    }
    if numbers.input_scale is not None:
        made["input_global_scale"] = numbers.input_scale.reciprocal().reshape(1)
    return made
