"""NVFP4's numbers: what ModelOpt and compressed-tensors wrote, and what is quantized here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mixedprec_plugin.errors import ShapeError
from mixedprec_plugin.methods.foreign.compressed_tensors.fp4 import codec as fp4_codec
from mixedprec_plugin.methods.nvfp4 import codec
from mixedprec_plugin.quantize import fp4
from tests.checkpoint.peers import peer_checkpoint
from tests.compose.repacking import layer_of, stream
from tests.quantize.peers import (
    LAYERS,
    config,
    is_expected,
    numpy_layer,
    original,
    relative_rms,
    torch_layer,
)
from tests.reference.dequantize import dequantize_checkpoint, nvfp4

layers = pytest.mark.parametrize("layer", LAYERS)
MODELOPT, COMPRESSED = "modelopt-nvfp4", "compressedtensors-nvfp4"
NONE = {"keep_input_scale": False}


@layers
@pytest.mark.parametrize(("folder", "reader"), [(MODELOPT, codec), (COMPRESSED, fp4_codec)])
def test_what_other_tools_wrote_is_read_as_the_format_says(folder, reader, layer) -> None:  # type: ignore[no-untyped-def]
    weight = reader.read(torch_layer(folder, layer), NONE).dequantize().numpy()
    reference = dequantize_checkpoint(numpy_layer(folder, layer), config(folder))
    np.testing.assert_array_equal(weight, reference, strict=True)
    # and as the tools themselves dequantize it
    assert is_expected(weight, folder, layer)


@layers
def test_repacked_it_is_what_compressed_tensors_says(tmp_path: Path, layer: str) -> None:
    made = layer_of(stream(peer_checkpoint(tmp_path / "model", COMPRESSED), "method: nvfp4"), layer)
    stored = torch_layer(COMPRESSED, layer)
    assert torch.equal(made["weight"], stored["weight_packed"])
    assert torch.equal(made["weight_scale"].float(), stored["weight_scale"].float())
    assert made["weight_scale_2"] == 1 / stored["weight_global_scale"][0]
    again = fp4_codec.write(codec.read(made, NONE), {}, torch.bfloat16)
    assert again.keys() == stored.keys()
    assert torch.equal(again["weight_packed"], stored["weight_packed"])
    assert torch.allclose(again["weight_global_scale"], stored["weight_global_scale"], rtol=2e-7)


@layers
def test_input_scales_are_left_where_none_is_asked_for(tmp_path: Path, layer: str) -> None:
    made = layer_of(stream(peer_checkpoint(tmp_path / "model", MODELOPT), "method: nvfp4"), layer)
    stored = torch_layer(MODELOPT, layer)
    assert made.keys() == stored.keys() - {"input_scale"}
    assert all(torch.equal(made[s].view(torch.uint8), t.view(torch.uint8))
               for s, t in stored.items() if s in made and t.dim())  # fmt: skip


@layers
def test_a_weight_is_rounded_nearer_than_by_the_tools(layer: str) -> None:
    made = codec.quantize(original(layer), NONE, torch.bfloat16)
    ours = relative_rms(codec.read(made, NONE).dequantize(), original(layer))
    theirs = relative_rms(
        codec.read(torch_layer(MODELOPT, layer), NONE).dequantize(), original(layer)
    )
    assert ours < 0.87 * theirs
    arrays = {s: t.float().numpy() if t.dtype != torch.uint8 else t.numpy()
              for s, t in made.items()}  # fmt: skip
    np.testing.assert_array_equal(nvfp4(arrays, {}), codec.read(made, NONE).dequantize().numpy())


def test_every_value_of_the_format_is_kept() -> None:
    # OCP Microscaling v1.0, table 5: e2m1
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    weight = torch.tensor([[*values, *(-value for value in values)]])
    made = codec.quantize(weight, NONE, torch.bfloat16)
    assert torch.equal(codec.read(made, NONE).dequantize(), weight)
    # the low nibble is the even column; the sign is the fourth bit
    assert made["weight"][0].tolist()[:4] == [0x10, 0x32, 0x54, 0x76]
    assert made["weight"][0, 5:].tolist() == [0xBA, 0xDC, 0xFE]


def test_no_other_scales_would_do_much_better() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 16, generator=generator)
    made = codec.read(codec.quantize(weight, NONE, torch.bfloat16), NONE).dequantize()
    values = torch.tensor(fp4.VALUES)
    values = torch.cat([values, -values])
    # every scale that e4m3 has, every code
    scales = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float() / 128
    errors = (weight[:, :, None, None] - scales[:, None] * values).abs().amin(-1)
    best = errors.square().sum(1).amin(1)
    # five scales of 126 are tried
    assert (made - weight).square().sum() < 1.05 * best.sum()


@pytest.mark.parametrize("number", [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
def test_ties_go_to_the_even_code(number: float) -> None:
    rounded = fp4.nearest(torch.tensor([number]))
    code = fp4.pack(torch.tensor([[float(rounded), 0.0]]))[0, 0]
    assert int(code) % 2 == 0
    assert abs(float(rounded) - number) == min(abs(value - number) for value in fp4.VALUES)


@pytest.mark.parametrize("largest", [1e-4, 0.3, 20.9, 21.1, 1000.0, 1e38])
def test_the_scale_of_the_whole_is_a_power_of_two_that_nearly_all_weights_share(
    largest: float,
) -> None:
    weight = torch.linspace(-largest, largest, 64).reshape(2, 32)
    made = codec.quantize(weight, NONE, torch.bfloat16)
    whole = float(made["weight_scale_2"])
    assert whole == float(torch.tensor(whole).bfloat16())
    assert (whole == 2**-7) == (largest <= 21)
    error = (codec.read(made, NONE).dequantize() - weight).abs().max()
    assert error <= largest / (6 if largest > 1e-3 else 3)


@pytest.mark.parametrize("largest", [9e-5, 1e-7])
def test_weights_too_small_for_any_scale_but_the_least_are_refused(largest: float) -> None:
    weight = torch.linspace(-largest, largest, 64).reshape(2, 32)
    with pytest.raises(ShapeError, match=rf"no larger than {largest:.3g} .* keep this layer in"):
        codec.quantize(weight, NONE, torch.bfloat16)
    # nothing is lost of zeros, and little of what float16 has no number for
    for nearly in (weight * 0, weight * 0 + 2.0**-25):
        made = codec.quantize(nearly, NONE, torch.bfloat16)
        assert not codec.read(made, NONE).dequantize().any()


def test_what_cannot_be_quantized_is_refused() -> None:
    with pytest.raises(ShapeError, match="K = 24 is not whole blocks"):
        codec.quantize(torch.ones(4, 24), NONE, torch.bfloat16)
    broken = torch.ones(4, 32)
    broken[2, 5] = float("nan")
    with pytest.raises(ShapeError, match=r"1 of 128 values are not finite.*\[2, 5\]"):
        codec.quantize(broken, NONE, torch.bfloat16)
    made = codec.quantize(torch.ones(4, 32), NONE, torch.bfloat16)
    with pytest.raises(ShapeError, match="weight_scale: shape"):
        codec.read({**made, "weight_scale": made["weight_scale"][:, :1]}, NONE)
