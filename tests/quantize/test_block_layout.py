"""The grid of scales of block formats: which tile each scale is of."""

from __future__ import annotations

import pytest
import torch

from tests.quantize.arrays import as_arrays
from tests.quantize.methods import case
from tests.reference.dequantize import dequantize_method


@pytest.mark.parametrize("name", ["fp8_block", "blockwise_int8"])
def test_scales_of_tiles_lie_where_the_reference_looks(name: str) -> None:
    """[320, 640] in tiles of 128: a grid of 3 by 5, every tile of another size, the last ragged."""
    method = case(name)
    sizes = torch.arange(1.0, 16.0).view(3, 5)
    tiles = sizes.repeat_interleave(128, 0)[:320].repeat_interleave(128, 1)
    weight = tiles * torch.rand(320, 640, generator=torch.Generator().manual_seed(0)).add(0.5)
    tensors = method.quantize(weight)
    read = dequantize_method(method.method, as_arrays(tensors), method.arguments)
    assert torch.equal(method.dequantize(tensors), torch.from_numpy(read))
    # e4m3 has 3 bits of mantissa: half a step is a sixteenth
    assert bool(((torch.from_numpy(read) - weight).abs() <= weight / 16).all())
