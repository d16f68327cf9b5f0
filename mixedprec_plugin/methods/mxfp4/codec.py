"""MXFP4 as SGLang's experts hold it: W = q * 2^(weight_scale - 127).

weight         uint8 [N, K/2]
weight_scale   uint8 [N, K/32]
"""

from __future__ import annotations

import torch

from mixedprec_plugin.methods.mxfp4 import GROUP_SIZE
from mixedprec_plugin.quantize.checks import take, take_matrix
from mixedprec_plugin.quantize.codec import Arguments, Numbers, TensorDict, Tensors
from mixedprec_plugin.quantize.fp4 import E4M3, E8M0, Fp4, Mxfp4Tiles, packed_tiles, quantize_blocks
from mixedprec_plugin.quantize.scaled import Scaled


def quantize(weight: torch.Tensor, _arguments: Arguments, _dtype: torch.dtype) -> TensorDict:
    """Quantize a weight to FP4, each block with the power of two of least squared error."""
    packed, scales, _ = quantize_blocks(weight, GROUP_SIZE, E8M0)
    return {"weight": packed, "weight_scale": scales.view(torch.uint8)}


def grid(_arguments: Arguments, _dtype: torch.dtype) -> Mxfp4Tiles:
    return Mxfp4Tiles(E4M3, 1, GROUP_SIZE)


def read(tensors: Tensors, _arguments: Arguments) -> Fp4:
    return numbers_of(tensors, "weight")


def numbers_of(tensors: Tensors, codes: str) -> Fp4:
    """Tell the numbers of `codes`, uint8 [N, K/2], and "weight_scale", uint8 [N, K/32]."""
    packed = take_matrix(tensors, codes, torch.uint8, "[N, K/2]")
    scales = take_matrix(tensors, "weight_scale", torch.uint8, "[N, K/32]")
    take(tensors, "weight_scale", (packed.shape[0], 2 * packed.shape[1] // GROUP_SIZE))
    return Fp4(packed, scales.view(E8M0), torch.ones((), device=packed.device))


def write(numbers: Numbers, _arguments: Arguments, _dtype: torch.dtype) -> TensorDict:
    """Store numbers, or what was rounded on `grid`, as `quantize` does."""
    if isinstance(numbers, Scaled):
        numbers = packed_tiles(numbers, E8M0)
    assert isinstance(numbers, Fp4)
    return {"weight": numbers.packed, "weight_scale": numbers.scales.view(torch.uint8)}
