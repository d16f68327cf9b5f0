"""MXFP4 as SGLang's experts hold it: W = q * 2^(weight_scale - 127).

weight         uint8 [N, K/2]
weight_scale   uint8 [N, K/32]
"""

from __future__ import annotations

import torch

from mixedprec_plugin.methods.mxfp4 import GROUP_SIZE
from mixedprec_plugin.quantize import fp4
from mixedprec_plugin.quantize.codec import Arguments, Numbers, TensorDict, Tensors
from mixedprec_plugin.quantize.scaled import Scaled


def quantize(weight: torch.Tensor, _arguments: Arguments, _dtype: torch.dtype) -> TensorDict:
    """Quantize a weight to FP4, each block with the power of two of least squared error."""
    packed, scales, _ = fp4.quantize_blocks(weight, GROUP_SIZE, fp4.E8M0)
    return {"weight": packed, "weight_scale": scales.view(torch.uint8)}


def grid(_arguments: Arguments, _dtype: torch.dtype) -> fp4.Mxfp4Tiles:
    return fp4.Mxfp4Tiles(fp4.E4M3, 1, GROUP_SIZE)


def read(tensors: Tensors, _arguments: Arguments) -> fp4.Fp4:
    return numbers_of(tensors, "weight")


def numbers_of(tensors: Tensors, codes: str) -> fp4.Fp4:
    """Tell the numbers of `codes`, uint8 [N, K/2], and "weight_scale", uint8 [N, K/32]."""
    packed, scales = fp4.take_blocks(tensors, codes, torch.uint8, GROUP_SIZE)
    return fp4.Fp4(packed, scales.view(fp4.E8M0), torch.ones((), device=packed.device))


def write(numbers: Numbers, _arguments: Arguments, _dtype: torch.dtype) -> TensorDict:
    """Store numbers, or what was rounded on `grid`, as `quantize` does."""
    if isinstance(numbers, Scaled):
        numbers = fp4.packed_tiles(numbers, fp4.E8M0)
    assert isinstance(numbers, fp4.Fp4)
    return {"weight": numbers.packed, "weight_scale": numbers.scales.view(torch.uint8)}
