"""MXFP4's numbers: as compressed-tensors and transformers read and write them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mixedprec_plugin.errors import ShapeError
from mixedprec_plugin.methods.foreign.compressed_tensors.fp4 import codec as fp4_codec
from mixedprec_plugin.methods.mxfp4 import codec
from mixedprec_plugin.methods.nvfp4 import codec as nvfp4
from tests.quantize.peers import LAYERS, original, relative_rms
from tests.quantize.test_against_compressed_tensors import compressor, scheme, theirs
from tests.reference.dequantize import mxfp4

FORMAT = "mxfp4-pack-quantized"


def mx_scheme() -> Any:
    """What llm-compressor's MXFP4A16 says, which is this method."""
    from compressed_tensors.quantization.quant_scheme import MXFP4A16

    return scheme(**MXFP4A16["weights"].model_dump())


def theirs_of(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A weight as compressed-tensors stores it, with scales of its own."""
    from compressed_tensors.quantization.utils import calculate_qparams

    made = mx_scheme()
    blocks = weight.float().unflatten(-1, (-1, 32))
    scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), made.weights)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    stored: dict[str, torch.Tensor] = compressor(FORMAT).compress(state, made)
    return stored


layers = pytest.mark.parametrize("layer", LAYERS)


@pytest.mark.slow
@layers
def test_what_the_library_wrote_is_read_as_it_reads_it(layer: str) -> None:
    stored = theirs_of(original(layer))
    assert {name: t.dtype for name, t in stored.items()} == {
        "weight_packed": torch.uint8, "weight_scale": torch.uint8
    }  # fmt: skip
    read = fp4_codec.read(stored, {}).dequantize()
    assert torch.equal(read, theirs(FORMAT, stored, mx_scheme()).float())
    assert 0.1 < relative_rms(read, original(layer)) < 0.13


@pytest.mark.slow
@layers
def test_what_is_quantized_here_is_read_by_the_library(layer: str) -> None:
    made = codec.quantize(original(layer), {}, torch.bfloat16)
    stored = {"weight_packed": made["weight"], "weight_scale": made["weight_scale"]}
    read = theirs(FORMAT, stored, mx_scheme()).float()
    assert torch.equal(read, codec.read(made, {}).dequantize())
    arrays = {name: t.numpy() for name, t in made.items()}
    np.testing.assert_array_equal(read.numpy(), mxfp4(arrays, {}))


@pytest.mark.slow
@layers
def test_a_weight_is_rounded_no_worse_than_by_the_library_and_worse_than_in_nvfp4(
    layer: str,
) -> None:
    weight = original(layer)
    ours = relative_rms(
        codec.read(codec.quantize(weight, {}, weight.dtype), {}).dequantize(), weight
    )
    library = relative_rms(fp4_codec.read(theirs_of(weight), {}).dequantize(), weight)
    other = nvfp4.read(nvfp4.quantize(weight, {}, weight.dtype), {}).dequantize()
    assert ours <= library
    assert ours > 1.2 * relative_rms(other, weight)


def test_gpt_oss_experts_are_the_same_numbers_as_transformers_makes_of_them() -> None:
    """Its blocks are these bytes, [E, N, K/32, 16], and its scales these exponents."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 64, 4, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(110, 130, (3, 64, 4), generator=generator, dtype=torch.uint8)
    # transposed, as its experts multiply
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16).transpose(1, 2)
    for expert in range(3):
        tensors = {"weight": blocks[expert].flatten(1), "weight_scale": scales[expert]}
        assert torch.equal(codec.read(tensors, {}).dequantize(), expected[expert].float())


def test_no_other_power_of_two_would_do_better() -> None:
    weight = torch.randn(256, 32, generator=torch.Generator().manual_seed(0))
    made = codec.read(codec.quantize(weight, {}, torch.bfloat16), {}).dequantize()
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    values = torch.cat([values, -values])
    scales = 2.0 ** torch.arange(-8, 4)
    errors = (weight[:, :, None, None] - scales[:, None] * values).abs().amin(-1)
    best = errors.square().sum(1).amin(1)
    torch.testing.assert_close((made - weight).square().sum(1), best)


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-4, 1.0, 1e30, 1.5e38])
def test_every_size_of_weight_has_a_scale(size: float) -> None:
    weight = torch.linspace(-size, size, 64).reshape(2, 32)
    made = codec.quantize(weight, {}, torch.bfloat16)
    # Marlin takes the exponent 0 for zero (dequant.h:493), and 255 is not a number
    assert 1 <= int(made["weight_scale"].min()) <= int(made["weight_scale"].max()) <= 254
    error = (codec.read(made, {}).dequantize() - weight).abs().max()
    assert error <= max(size / 5, 2.0**-128)


def test_what_cannot_be_quantized_is_refused() -> None:
    with pytest.raises(ShapeError, match="K = 48 is not whole blocks"):
        codec.quantize(torch.ones(4, 48), {}, torch.bfloat16)
    made = codec.quantize(torch.ones(4, 64), {}, torch.bfloat16)
    with pytest.raises(ShapeError, match="weight_scale: shape"):
        codec.read({**made, "weight_scale": made["weight_scale"][:, :1]}, {})
