"""`dequantize` on checkpoints that other tools wrote, against the reference, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from mixedprec_plugin.errors import ShapeError
from mixedprec_plugin.methods.awq import codec as awq
from mixedprec_plugin.methods.fp8 import codec as fp8
from mixedprec_plugin.methods.fp8_channel import codec as fp8_channel
from mixedprec_plugin.methods.gptq import codec as gptq
from mixedprec_plugin.methods.int8_channel import codec as int8_channel
from mixedprec_plugin.quantize import packing
from tests.quantize.peers import LAYERS, config, is_expected, numpy_layer, torch_layer
from tests.reference.dequantize import dequantize_checkpoint

Tensors = dict[str, torch.Tensor]
AWQ = ("autoawq-g64", "autoround-awq-asym-g64", "autoround-sym-awqpack-g64")
GPTQ = (
    "autoround-gptq-g64",
    "autoround-native-g64",
    "gptqmodel-asym-g64",
    "gptqmodel-gptq-g64",
)
GPTQ_ASYMMETRIC = "gptqmodel-asym-g64"
BY_CHANNEL = ("llmcompressor-w8a8-int8", "autoround-int8")
layers = pytest.mark.parametrize("layer", LAYERS)


def assert_as_reference(weight: torch.Tensor, folder: str, layer: str) -> None:
    reference = dequantize_checkpoint(numpy_layer(folder, layer), config(folder))
    np.testing.assert_array_equal(weight.numpy(), reference, strict=True)


@layers
@pytest.mark.parametrize("folder", AWQ)
def test_awq_equals_the_reference(folder: str, layer: str) -> None:
    assert_as_reference(
        awq.read(torch_layer(folder, layer), config(folder)).dequantize(), folder, layer
    )


@layers
@pytest.mark.parametrize("folder", GPTQ)
def test_gptq_equals_the_reference(folder: str, layer: str) -> None:
    assert_as_reference(
        gptq.read(torch_layer(folder, layer), config(folder)).dequantize(), folder, layer
    )


@layers
def test_fp8_block_with_ragged_edges_equals_the_reference(layer: str) -> None:
    folder = "llmcompressor-fp8-block"
    tensors = torch_layer(folder, layer)
    ours = {"weight": tensors["weight"], "weight_scale_inv": tensors["weight_scale"]}
    assert ours["weight_scale_inv"].shape == (2, 5)
    assert_as_reference(
        fp8.read(ours, {"weight_block_size": [128, 128]}).dequantize(), folder, layer
    )


@layers
def test_fp8_by_channel_equals_the_reference(layer: str) -> None:
    folder = "llmcompressor-fp8-dynamic"
    tensors = torch_layer(folder, layer)
    assert tensors["weight_scale"].shape == (len(tensors["weight"]), 1)
    assert_as_reference(fp8_channel.read(tensors, {}).dequantize(), folder, layer)


@layers
@pytest.mark.parametrize("folder", BY_CHANNEL)
def test_int8_by_channel_equals_the_reference(folder: str, layer: str) -> None:
    tensors = torch_layer(folder, layer)
    assert tensors["weight_scale"].shape == (len(tensors["weight"]), 1)
    assert_as_reference(int8_channel.read(tensors, {}).dequantize(), folder, layer)


@layers
def test_gptq_reads_groups_out_of_order(layer: str) -> None:
    folder = "gptqmodel-asym-g64"
    tensors, arguments = torch_layer(folder, layer), config(folder)
    order = torch.randperm(576, generator=torch.Generator().manual_seed(0))
    codes = packing.unpack(tensors["qweight"].t(), 4)
    shuffled = {
        **tensors,
        "qweight": packing.pack(codes[:, order], 4).t().contiguous(),
        "g_idx": tensors["g_idx"][order],
    }
    in_order = gptq.read(tensors, arguments).dequantize()
    assert torch.equal(gptq.read(shuffled, arguments).dequantize(), in_order[:, order])


@layers
def test_gptq_v2_stores_the_zero_itself(layer: str) -> None:
    folder = "gptqmodel-asym-g64"
    tensors, arguments = torch_layer(folder, layer), config(folder)
    assert int(packing.unpack(tensors["qzeros"], 4).max()) < 15, "adding one must not carry"
    v2 = {**tensors, "qzeros": tensors["qzeros"] + 0x11111111}
    weight = gptq.read(v2, {**arguments, "checkpoint_format": "gptq_v2"}).dequantize()
    assert_as_reference(weight, folder, layer)


def with_zeros_of_zero(bits: int, num_rows: int) -> tuple[Tensors, torch.Tensor, torch.Tensor]:
    """A v1 layer [num_rows, 128] in groups of 32, some rows positive; its zeros and its weight."""
    generator = torch.Generator().manual_seed(0)
    K, middle, most = 128, 1 << (bits - 1), (1 << bits) - 1
    weight = torch.randn(num_rows, K, generator=generator) * middle / 3
    zeros = torch.randint(middle - 2, middle + 3, (num_rows, 4), generator=generator)
    weight[::16], zeros[::16] = weight[::16].abs(), 0
    codes = (weight.round() + zeros.repeat_interleave(32, 1)).clamp(0, most)
    tensors = {
        "qweight": packing.pack(codes.to(torch.uint8), bits).t().contiguous(),
        "scales": torch.ones(4, num_rows),
    }
    return tensors, zeros, codes - zeros.repeat_interleave(32, 1)


# a step of 8 bits is too small to tell words from codes, and to matter
@pytest.mark.parametrize(("bits", "packed"), [(4, "by code"), (4, "by word"), (8, "by code")])
def test_gptq_v1_keeps_zero_points_of_zero_whoever_packed_them(bits: int, packed: str) -> None:
    """GPTQModel's `_shift_gptq_qzeros` and `convert_gptq_v2_to_v1_format_module`."""
    tensors, zeros, weight = with_zeros_of_zero(bits, 256)
    shifted = ((zeros - 1) & ((1 << bits) - 1)) if packed == "by code" else zeros
    qzeros = packing.pack(shifted.t().contiguous().to(torch.uint8), bits)
    tensors["qzeros"] = qzeros - (0x11111111 if packed == "by word" else 0)
    arguments = {"bits": bits, "group_size": 32}
    assert torch.equal(gptq.read(tensors, arguments).dequantize(), weight)


def test_zero_points_beside_one_of_zero_that_nothing_tells_are_refused() -> None:
    tensors, zeros, _ = with_zeros_of_zero(4, 16)
    shifted = ((zeros - 1) & 15).t().contiguous().to(torch.uint8)
    tensors["qzeros"] = packing.pack(shifted, 4)
    with pytest.raises(ShapeError, match="qzeros: nothing tells whether 4 of them are stored one"):
        gptq.read(tensors, {"bits": 4, "group_size": 32})


def test_g_idx_that_was_never_set_is_in_order() -> None:
    """AutoGPTQ: `(g_idx == 0).all()` is no act order."""
    tensors = {**torch_layer(GPTQ[1], LAYERS[0])}
    tensors["g_idx"] = torch.zeros(576, dtype=torch.int32)
    weight = gptq.read(tensors, config(GPTQ[1])).dequantize()
    assert_as_reference(weight, GPTQ[1], LAYERS[0])
    ordered = {**config(GPTQ[1]), "desc_act": True}
    with pytest.raises(ShapeError, match=r"g_idx: groups of 0 to 576 \(expected 64\)"):
        gptq.read(tensors, ordered).dequantize()


@pytest.mark.parametrize("folder", [f for f in GPTQ if "asym" not in f])
@pytest.mark.parametrize("wrong", ["gptq", "gptq_v2"])
def test_symmetric_zero_points_tell_the_format_that_config_json_does_not(
    folder: str, wrong: str
) -> None:
    tensors = torch_layer(folder, LAYERS[0])
    if wrong == "gptq":
        tensors = {**tensors, "qzeros": tensors["qzeros"] + 0x11111111}
    arguments = {**config(folder), "checkpoint_format": wrong}
    assert_as_reference(gptq.read(tensors, arguments).dequantize(), folder, LAYERS[0])


def test_zero_points_that_no_quantizer_has_made_are_refused() -> None:
    tensors = {**torch_layer(GPTQ[0], LAYERS[0])}
    tensors["qzeros"] = torch.zeros_like(tensors["qzeros"])
    with pytest.raises(ShapeError, match=r"qzeros: all are 0 \(expected 7, or 8 in gptq_v2"):
        gptq.read(tensors, config(GPTQ[0]))


def swap_nibbles(tensors: Tensors) -> Tensors:
    octets = tensors["qweight"].view(torch.uint8)
    return {**tensors, "qweight": ((octets << 4) | (octets >> 4)).view(torch.int32)}


def zeros_off_by_one(tensors: Tensors) -> Tensors:
    # of every other group: those of a whole symmetric layer would tell what they are
    qzeros = tensors["qzeros"].clone()
    qzeros[::2] += 0x11111111
    return {**tensors, "qzeros": qzeros}


def groups_reversed(tensors: Tensors) -> Tensors:
    return {**tensors, "scales": tensors["scales"].flip(0)}


def one_nibble_changed(tensors: Tensors) -> Tensors:
    qweight = tensors["qweight"].clone()
    qweight[0, 0] ^= 1
    return {**tensors, "qweight": qweight}


@pytest.mark.parametrize(
    "mutate", [swap_nibbles, zeros_off_by_one, groups_reversed, one_nibble_changed]
)
@pytest.mark.parametrize("folder", [*AWQ, *GPTQ])
def test_a_mutated_checkpoint_is_noticed(folder: str, mutate: Callable[[Tensors], Tensors]) -> None:
    method = awq if folder in AWQ else gptq
    tensors = torch_layer(folder, LAYERS[0])
    assert is_expected(method.read(tensors, config(folder)).dequantize().numpy(), folder, LAYERS[0])
    mutated = method.read(mutate(tensors), config(folder)).dequantize().numpy()
    assert not is_expected(mutated, folder, LAYERS[0])


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4, 5, 6, 7), (0, 4, 1, 5, 2, 6, 3, 7)])
def test_another_nibble_order_is_noticed(
    order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "AWQ_ORDER", order)
    weight = awq.read(torch_layer(AWQ[1], LAYERS[0]), config(AWQ[1])).dequantize()
    assert not is_expected(weight.numpy(), AWQ[1], LAYERS[0])


@pytest.mark.parametrize("wrong", ["gptq", "gptq_v2"])
def test_codes_tell_the_format_of_asymmetric_zero_points(wrong: str) -> None:
    tensors = torch_layer(GPTQ_ASYMMETRIC, LAYERS[0])
    if wrong == "gptq":
        tensors = {**tensors, "qzeros": tensors["qzeros"] + 0x11111111}
    arguments = {**config(GPTQ_ASYMMETRIC), "checkpoint_format": wrong}
    assert_as_reference(gptq.read(tensors, arguments).dequantize(), GPTQ_ASYMMETRIC, LAYERS[0])


@pytest.mark.parametrize(("mean", "form"), [(-0.02, "gptq"), (0.02, "gptq_v2")])
def test_eight_bits_whose_weights_have_a_mean_of_one_code_are_refused(
    mean: float, form: str
) -> None:
    """W = (q - zero) * scale, each group's range over 255; AutoGPTQ's `Quantizer.find_params`."""
    weight = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0)) + mean
    groups = weight.view(64, 32, 128)
    low, high = groups.amin(2), groups.amax(2)
    scales = (high - low) / 255
    zeros = (-low / scales).round()
    codes = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, 255)
    stored = zeros - float(form == "gptq")
    tensors = {
        "qweight": codes.view(64, 4096).T.to(torch.uint8).view(1024, 4, 64).transpose(1, 2)
        .contiguous().view(torch.int32).squeeze(2),
        "qzeros": stored.T.to(torch.uint8).contiguous().view(torch.int32),
        "scales": scales.T.contiguous(),
    }  # fmt: skip
    arguments = {"bits": 8, "group_size": 128, "checkpoint_format": form}
    with pytest.raises(ShapeError, match="qzeros: nothing tells whether all of them are stored"):
        gptq.read(tensors, arguments)


def test_transposed_block_scales_are_refused() -> None:
    tensors = torch_layer("llmcompressor-fp8-block", LAYERS[0])
    turned = {"weight": tensors["weight"], "weight_scale_inv": tensors["weight_scale"].t()}
    with pytest.raises(ShapeError, match=r"weight_scale_inv: shape \[5, 2\] \(expected \[2, 5\]\)"):
        fp8.read(turned, {"weight_block_size": [128, 128]}).dequantize()


def test_transposed_square_block_scales_are_noticed() -> None:
    tensors = torch_layer("llmcompressor-fp8-block", LAYERS[0])
    square = {
        "weight": tensors["weight"],
        "weight_scale_inv": torch.rand(2, 2, generator=torch.Generator().manual_seed(0)),
    }
    turned = {**square, "weight_scale_inv": square["weight_scale_inv"].t()}
    arguments = {"weight_block_size": [128, 288]}
    rows = torch.arange(192)[:, None] // 128
    columns = torch.arange(576)[None, :] // 288
    by_hand = square["weight"].float() * square["weight_scale_inv"][rows, columns]
    assert torch.equal(fp8.read(square, arguments).dequantize(), by_hand)
    assert not torch.equal(fp8.read(turned, arguments).dequantize(), by_hand)
