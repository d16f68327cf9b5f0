"""`quantize` against what other tools made of the same weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mixedprec_plugin.methods.awq import codec as awq
from mixedprec_plugin.methods.blockwise_int8 import codec as blockwise_int8
from mixedprec_plugin.methods.fp8 import codec as fp8
from mixedprec_plugin.methods.fp8_channel import codec as fp8_channel
from mixedprec_plugin.methods.gptq import codec as gptq
from mixedprec_plugin.methods.int8_channel import codec as int8_channel
from mixedprec_plugin.quantize import packing
from tests.quantize.peers import EXPECTED, LAYERS, original, relative_rms, torch_layer

layers = pytest.mark.parametrize("layer", LAYERS)
G64 = {"group_size": 64}


@layers
def test_awq_reproduces_autoround_rtn_bit_for_bit(layer: str) -> None:
    ours = awq.quantize(original(layer), G64, torch.float16)
    theirs = torch_layer("autoround-awq-asym-g64", layer)
    assert ours.keys() == theirs.keys()
    for suffix, tensor in theirs.items():
        assert ours[suffix].dtype == tensor.dtype
        assert torch.equal(ours[suffix], tensor), suffix


@layers
def test_awq_grid_is_that_of_gptqmodel(layer: str) -> None:
    ours = awq.quantize(original(layer), G64, torch.float16)
    theirs = torch_layer("gptqmodel-asym-g64", layer)
    assert torch.equal(ours["scales"], theirs["scales"])
    zeros = packing.unpack(theirs["qzeros"], 4).t() + 1
    differing = packing.unpack_awq(ours["qzeros"]) != zeros
    # It rounds zero points of scales that are not rounded yet: only ties differ, by one.
    assert differing.float().mean() < 0.01
    codes = packing.unpack(theirs["qweight"].t(), 4)
    same_group = ~differing.repeat_interleave(64, dim=1)
    agreement = (packing.unpack_awq(ours["qweight"]) == codes)[same_group].float().mean()
    assert agreement > 0.999


@layers
@pytest.mark.parametrize(
    ("folder", "block"),
    [("llmcompressor-fp8-block", [128, 128]), ("llmcompressor-fp8-dynamic", [1, 576])],
)
def test_fp8_scales_are_those_of_llmcompressor(folder: str, block: list[int], layer: str) -> None:
    ours = fp8.quantize(original(layer), {"weight_block_size": block}, torch.bfloat16)
    theirs = torch_layer(folder, layer)
    assert torch.equal(ours["weight_scale_inv"].bfloat16(), theirs["weight_scale"])
    # Theirs are rounded to bf16, which moves a few codes to the neighbour.
    codes, their_codes = (t["weight"].view(torch.int8).short() for t in (ours, theirs))
    assert (codes == their_codes).float().mean() > 0.97
    assert (codes - their_codes).abs().max() <= 1


@layers
def test_fp8_by_channel_is_that_of_llmcompressor(layer: str) -> None:
    ours = fp8_channel.quantize(original(layer), {}, torch.bfloat16)
    theirs = torch_layer("llmcompressor-fp8-dynamic", layer)
    assert ours.keys() == theirs.keys()
    assert torch.equal(ours["weight_scale"].bfloat16(), theirs["weight_scale"])
    # Theirs are rounded to bf16, which moves a few codes to the neighbour.
    codes, their_codes = (t["weight"].view(torch.int8).short() for t in (ours, theirs))
    assert (codes == their_codes).float().mean() > 0.97
    assert (codes - their_codes).abs().max() <= 1


@layers
def test_fp8_by_channel_is_fp8_in_blocks_of_a_row(layer: str) -> None:
    weight = original(layer)
    ours = fp8_channel.quantize(weight, {}, torch.bfloat16)
    rows = fp8.quantize(weight, {"weight_block_size": [1, 576]}, torch.bfloat16)
    assert torch.equal(ours["weight_scale"], rows["weight_scale_inv"])
    assert torch.equal(ours["weight"].view(torch.uint8), rows["weight"].view(torch.uint8))


@layers
def test_fp8_by_row_is_that_of_gptqmodel(layer: str) -> None:
    ours = fp8.quantize(original(layer), {"weight_block_size": [1, 576]}, torch.bfloat16)
    theirs = torch_layer("gptqmodel-fp8-row", layer)
    product = ours["weight_scale_inv"].flatten() * theirs["weight_scale_inv"]
    torch.testing.assert_close(product, torch.ones(192), rtol=0, atol=2**-22)
    agreement = (ours["weight"].float() == theirs["weight"].float()).float().mean()
    assert agreement > 0.999


@layers
def test_int8_is_that_of_llmcompressor_to_one_step(layer: str) -> None:
    ours = int8_channel.quantize(original(layer), {}, torch.bfloat16)
    theirs = torch_layer("llmcompressor-w8a8-int8", layer)
    assert ours.keys() == theirs.keys()
    # It divides by 127.5, so that its lowest code is -128.
    ratio = ours["weight_scale"] / theirs["weight_scale"].float()
    torch.testing.assert_close(ratio, torch.full_like(ratio, 127.5 / 127), rtol=2**-8, atol=0)
    assert (ours["weight"].short() - theirs["weight"].short()).abs().max() <= 1


@layers
def test_int8_by_channel_is_int8_in_blocks_of_a_row(layer: str) -> None:
    weight = original(layer)
    ours = int8_channel.quantize(weight, {}, torch.bfloat16)
    rows = blockwise_int8.quantize(weight, {"weight_block_size": [1, 576]}, torch.bfloat16)
    assert torch.equal(ours["weight_scale"], rows["weight_scale_inv"])
    assert torch.equal(ours["weight"], rows["weight"])


@pytest.mark.parametrize(
    ("module", "arguments", "folder"),
    [
        (awq, G64, "llmcompressor-w4a16-asym-g64"),
        (gptq, {**G64, "bits": 4}, "llmcompressor-w4a16-g64"),
        (gptq, {**G64, "bits": 4}, "autoround-gptq-g64"),
        (gptq, {**G64, "bits": 4}, "gptqmodel-gptq-g64"),
        (gptq, {**G64, "bits": 8}, "llmcompressor-w8a8-int8"),
        (fp8, {"weight_block_size": [128, 128]}, "llmcompressor-fp8-block"),
        (fp8_channel, {}, "llmcompressor-fp8-dynamic"),
        (int8_channel, {}, "llmcompressor-w8a8-int8"),
    ],
)
@layers
def test_no_further_from_the_original_than_the_peer(
    module: Any, arguments: dict[str, Any], folder: str, layer: str
) -> None:
    weight = original(layer)
    tensors = module.quantize(weight, arguments, torch.bfloat16)
    ours = relative_rms(module.read(tensors, arguments).dequantize(), weight)
    assert ours < EXPECTED[folder][f"{layer}.weight"]["relative_rms_to_bf16"] * 1.001


@layers
@pytest.mark.parametrize("folder", ["autoround-gptq-g64", "gptqmodel-gptq-g64"])
def test_gptq_zeros_and_groups_are_stored_as_others_store_them(folder: str, layer: str) -> None:
    ours = gptq.quantize(original(layer), {**G64, "bits": 4}, torch.float16)
    theirs = torch_layer(folder, layer)
    assert ours.keys() == theirs.keys()
    for suffix, tensor in theirs.items():
        assert (ours[suffix].dtype, ours[suffix].shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(ours["qzeros"], theirs["qzeros"])
    assert torch.equal(ours["g_idx"], theirs["g_idx"])
