"""Repacked layers against the stored numbers, an independent dequantizer and other tools' files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixedprec_plugin.errors import CheckpointError
from mixedprec_plugin.methods.awq import codec as awq
from mixedprec_plugin.methods.gptq import codec as gptq
from mixedprec_plugin.methods.interface import Target
from tests.checkpoint.peers import peer_checkpoint
from tests.checkpoints import write_checkpoint
from tests.compose.repacking import LAYER, compressed, layer_of, stream
from tests.presets import plan
from tests.quantize.peers import FILE, LAYERS, PEERS, config, numpy_layer, torch_layer
from tests.reference import dequantize as independent
from tests.reference.dequantize import dequantize_checkpoint

GPTQ = {"bits": 4, "group_size": 64, "desc_act": False}
# peer, the method that it is repacked as, a dtype that holds its scales
PAIRS = [
    ("autoround-sym-awqpack-g64", "gptq", "F16"),
    ("autoround-gptq-g64", "awq", "F16"),
    ("autoround-native-g64", "awq", "F16"),
    ("gptqmodel-gptq-g64", "awq", "F16"),
    ("gptqmodel-asym-g64", "awq", "F16"),
    ("llmcompressor-w4a16-g64", "gptq", "BF16"),
    ("llmcompressor-w4a16-g64", "awq", "BF16"),
    ("llmcompressor-w4a16-asym-g64", "awq", "BF16"),
]


@pytest.mark.parametrize(("folder", "method", "dtype"), PAIRS)
def test_repacked_peer_dequantizes_to_the_same_bits(
    tmp_path: Path, folder: str, method: str, dtype: str
) -> None:
    model = peer_checkpoint(tmp_path / "model", folder)
    tensors = stream(model, f"method: {method}, group_size: 64", dtype)
    for layer in LAYERS:
        stored = dequantize_checkpoint(numpy_layer(folder, layer), config(folder))
        repacked = layer_of(tensors, layer)
        scales = next(t for s, t in torch_layer(folder, layer).items() if "scale" in s)
        assert torch.equal(repacked["scales"].float(), _spread(scales, repacked["scales"]))
        arrays = {suffix: t.float().numpy() if t.is_floating_point() else t.numpy()
                  for suffix, t in repacked.items()}  # fmt: skip
        read = independent.awq if method == "awq" else independent.gptq
        assert (read(arrays, GPTQ) == stored).all()


def _spread(stored: torch.Tensor, served: torch.Tensor) -> torch.Tensor:
    return (stored if stored.shape == served.shape else stored.t()).float()


def test_auto_rounds_two_packings_repack_to_each_others_files(tmp_path: Path) -> None:
    """auto-round wrote the same numbers in both: its own files are the expectation."""
    awq_model = peer_checkpoint(tmp_path / "awq" / "model", "autoround-sym-awqpack-g64")
    gptq_model = peer_checkpoint(tmp_path / "gptq" / "model", "autoround-gptq-g64")
    to_gptq = stream(awq_model, "method: gptq, group_size: 64", "F16")
    to_awq = stream(gptq_model, "method: awq, group_size: 64", "F16")
    for layer in LAYERS:
        for suffix, tensor in torch_layer("autoround-gptq-g64", layer).items():
            assert torch.equal(to_gptq[f"{layer}.{suffix}"], tensor), suffix
        for suffix, tensor in torch_layer("autoround-sym-awqpack-g64", layer).items():
            assert torch.equal(to_awq[f"{layer}.{suffix}"], tensor), suffix


@pytest.mark.parametrize(
    ("folder", "description"),
    [
        ("autoawq-g64", "awq 4-bit group 64"),
        ("autoround-awq-asym-g64", "awq 4-bit group 64"),
        ("llmcompressor-w4a16-asym-g64", "pack-quantized 4-bit group 64 asymmetric"),
        ("gptqmodel-asym-g64", "gptq 4-bit group 64 asymmetric"),
    ],
)
def test_asymmetric_layer_is_no_gptq_layer(tmp_path: Path, folder: str, description: str) -> None:
    model = peer_checkpoint(tmp_path / "model", folder)
    rule = 'match: "*_proj", method: gptq, group_size: 64'
    (problem,) = plan(model, rule, target=Target(device="cpu")).errors
    assert f"is stored as {description}, " in str(problem)
    assert "it is asymmetric, and gptq is served symmetric only; " in str(problem)
    assert "requantize: true" in str(problem)
    tensors = stream(model, "method: gptq, group_size: 64, requantize: true", action="requantize")
    assert f"{LAYERS[0]}.g_idx" in tensors


def replace(model: Path, folder: str, suffix: str, change: Callable[..., torch.Tensor]) -> None:
    """Change one tensor of the first layer of a peer."""
    tensors = load_file(PEERS / folder / FILE)
    name = f"{LAYERS[0]}.{suffix}"
    tensors[name] = change(tensors[name]).contiguous()
    (model / "model.safetensors").unlink()
    save_file(tensors, model / "model.safetensors")


def test_awq_without_a_config_is_gptq_if_its_zero_points_say_so(tmp_path: Path) -> None:
    model = peer_checkpoint(tmp_path / "model", "autoround-sym-awqpack-g64", quant_method=None)
    rule = "method: gptq, group_size: 64"
    assert torch.equal(
        stream(model, rule, "F16")[f"{LAYERS[0]}.qweight"],
        torch_layer("autoround-gptq-g64", LAYERS[0])["qweight"],
    )
    asymmetric = peer_checkpoint(tmp_path / "other" / "model", "autoawq-g64", quant_method=None)
    message = (
        r"k_proj: is stored as awq 4-bit group 64 and was to be repacked as gptq, but [\d,]+ of "
        r"its 1,728 zero points are not 8, and gptq is served symmetric only; write requantize: "
        r"true to quantize it again, or method: bf16"
    )
    with pytest.raises(CheckpointError, match=message):
        stream(asymmetric, rule)
    stream(asymmetric, f"{rule}, requantize: true", action="requantize")


def test_a_zero_point_of_zero_is_repacked(tmp_path: Path) -> None:
    folder = "gptqmodel-asym-g64"
    model = peer_checkpoint(tmp_path / "model", folder)
    # v1 stores zero - 1 in four bits
    replace(model, folder, "qzeros", lambda words: words | 15)
    made = stream(model, "method: awq, group_size: 64")
    stored = awq.read(layer_of(made, LAYERS[0]), {"group_size": 64}).zeros
    assert not stored[::8].any()
    assert stored[1::8].all()


def test_group_order_that_breaks_the_configs_word_is_an_error(tmp_path: Path) -> None:
    folder = "gptqmodel-gptq-g64"
    model = peer_checkpoint(tmp_path / "model", folder)
    replace(model, folder, "g_idx", lambda order: order.flip(0))
    with pytest.raises(CheckpointError, match="but its groups are in act order; match it with"):
        stream(model, "method: awq, group_size: 64")


def test_trivial_act_order_is_dropped_where_the_preset_says_so(tmp_path: Path) -> None:
    folder = "gptqmodel-gptq-g64"
    model = peer_checkpoint(tmp_path / "model", folder, desc_act=True)
    rule = "method: gptq, group_size: 64"
    stream(model, rule, "F16", action="as stored")
    tensors = stream(model, f"{rule}, desc_act: false", "F16")
    for suffix, tensor in torch_layer(folder, LAYERS[0]).items():
        served = tensors[f"{LAYERS[0]}.{suffix}"]
        assert torch.equal(served, tensor.to(served.dtype))
    replace(model, folder, "g_idx", lambda order: order.flip(0))
    with pytest.raises(CheckpointError, match="its groups are in act order; write desc_act: true"):
        stream(model, f"{rule}, desc_act: false", "F16")
    with_order = stream(model, rule, "F16", action="as stored")
    assert int(with_order[f"{LAYERS[0]}.g_idx"][0]) == 8


def test_act_order_is_no_awq_layer(tmp_path: Path) -> None:
    model = peer_checkpoint(tmp_path / "model", "gptqmodel-gptq-g64", desc_act=True)
    rule = 'match: "*_proj", method: awq, group_size: 64'
    (problem,) = plan(model, rule, target=Target(device="cpu")).errors
    assert "not as awq asks (awq): its groups are in act order; " in str(problem)


def test_gptq_v2_is_v1_with_every_zero_point_one_less(tmp_path: Path) -> None:
    folder = "autoround-gptq-g64"
    model = peer_checkpoint(tmp_path / "model", folder, checkpoint_format="gptq_v2")
    for layer in LAYERS:
        tensors = load_file(model / "model.safetensors")
        tensors[f"{layer}.qzeros"] = tensors[f"{layer}.qzeros"] + 0x11111111
        (model / "model.safetensors").unlink()
        save_file(tensors, model / "model.safetensors")
    made = stream(model, "method: gptq, group_size: 64", "F16")
    for suffix, tensor in torch_layer(folder, LAYERS[0]).items():
        assert torch.equal(made[f"{LAYERS[0]}.{suffix}"], tensor), suffix


def test_scale_that_float16_does_not_hold_is_an_error(tmp_path: Path) -> None:
    folder = "llmcompressor-w4a16-g64"
    model = peer_checkpoint(tmp_path / "model", folder)
    stream(model, "method: gptq, group_size: 64", "F16")
    first = torch.tensor(0)
    for value in (1e-7, 1e5):
        replace(model, folder, "weight_scale", lambda t, v=value: t.index_fill(0, first, v))
        with pytest.raises(CheckpointError, match="9 of its 1,728 scales do not fit in float16; "
                           "start with --dtype bfloat16"):  # fmt: skip
            stream(model, "method: gptq, group_size: 64", "F16")


def test_eight_bits_of_pack_quantized_are_gptq_of_eight_bits(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (256, 128), generator=generator, dtype=torch.uint8)
    scales = torch.rand(256, 1, generator=generator).to(torch.bfloat16)
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    config = compressed("pack-quantized", weights, None)
    model = write_checkpoint(tmp_path / "model", config, {
        f"{LAYER}.weight_packed": codes.view(torch.int32),
        f"{LAYER}.weight_scale": scales,
        f"{LAYER}.weight_shape": torch.tensor([256, 128]),
        f"{LAYER}.bias": torch.rand(256, generator=generator).to(torch.bfloat16),
    })  # fmt: skip
    # K is one group of 128: the two spellings are one
    for group in (-1, 128):
        made = layer_of(stream(model, f"method: gptq_int8, group_size: {group}"), LAYER)
        assert set(made) == {"qweight", "qzeros", "scales", "g_idx", "bias"}
        read = gptq.read(made, {"bits": 8, "group_size": 128}).dequantize()
        assert torch.equal(read, (codes.float() - 128) * scales.float())


def test_awq_dequantizes_what_gptq_did_not_round_again(tmp_path: Path) -> None:
    """GPTQ -> AWQ -> (read) and GPTQ -> (read) are one, through the product's own readers."""
    model = peer_checkpoint(tmp_path / "model", "gptqmodel-asym-g64")
    made = layer_of(stream(model, "method: awq, group_size: 64", "F16"), LAYERS[1])
    arguments = {"bits": 4, "group_size": 64, "checkpoint_format": "gptq"}
    expected = gptq.read(torch_layer("gptqmodel-asym-g64", LAYERS[1]), arguments).dequantize()
    assert torch.equal(awq.read(made, {"group_size": 64}).dequantize(), expected)
