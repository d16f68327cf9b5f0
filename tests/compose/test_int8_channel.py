"""INT8 with a scale a channel: taken as stored, repacked, quantized, dequantized, in experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.methods.stored import TensorSpec
from tests.checkpoint.peers import peer_checkpoint
from tests.checkpoints import write_checkpoint
from tests.compose.repacking import LAYER, compressed, layer_of, stream
from tests.presets import plan
from tests.quantize.peers import LAYERS, config, numpy_layer, original, relative_rms, torch_layer
from tests.reference.dequantize import by_channel, dequantize_checkpoint

PEERS = ("llmcompressor-w8a8-int8", "autoround-int8")
TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
CHANNEL = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["int8_channel", "w8a8_int8"])
@pytest.mark.parametrize("peer", PEERS)
def test_what_other_tools_write_is_taken_as_stored(
    tmp_path: Path, peer: str, name: str, device: Any
) -> None:
    model = peer_checkpoint(tmp_path / "model", peer)
    made = plan(model, f'match: "*.k_proj", method: {name}', target=Target(device=device))
    assert not made.errors
    # k by the rule, v by what it is
    for layer in LAYERS:
        planned = made.by_name[layer]
        assert (planned.action, planned.method) == ("as stored", "int8_channel")
        assert planned.outputs == {
            "weight": TensorSpec("I8", (192, 576)),
            "weight_scale": TensorSpec("F32", (192, 1)),
        }
        assert 8 * planned.bytes_after / planned.num_weights == 8 + 32 / 576


@pytest.mark.parametrize("peer", PEERS)
def test_codes_stay_what_they_are_and_bf16_dequantizes_them(tmp_path: Path, peer: str) -> None:
    model, stored = peer_checkpoint(tmp_path / "model", peer), torch_layer(peer, LAYERS[0])
    taken = layer_of(stream(model, "method: int8_channel", action="as stored"), LAYERS[0])
    assert torch.equal(taken["weight"], stored["weight"])
    assert torch.equal(taken["weight_scale"], stored["weight_scale"].float())
    read = dequantize_checkpoint(numpy_layer(peer, LAYERS[0]), config(peer))
    floats = layer_of(stream(model, "method: bf16", action="dequantize"), LAYERS[0])["weight"]
    assert torch.equal(floats, torch.from_numpy(np.ascontiguousarray(read)).bfloat16())


@pytest.mark.parametrize("shape", [(), (1,), (256,)])
def test_other_shapes_of_scales_become_a_column(tmp_path: Path, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (256, 384), generator=generator).to(torch.int8)
    scale = torch.rand(shape, generator=generator).add_(0.01).bfloat16()
    said = compressed("int-quantized", {**CHANNEL, "strategy": "tensor"}, TOKEN)
    tensors = {f"{LAYER}.weight": codes, f"{LAYER}.weight_scale": scale}
    model = write_checkpoint(tmp_path / "model", said, tensors)
    made = layer_of(stream(model, "method: int8_channel"), LAYER)
    assert torch.equal(made["weight"], codes)
    assert torch.equal(made["weight_scale"], scale.float().reshape(-1, 1).expand(256, 1))


@pytest.mark.parametrize(
    ("weights", "more"),
    [
        ({}, {"input_scale": torch.tensor([0.1])}),
        ({"symmetric": False}, {"weight_zero_point": torch.ones(256, 1, dtype=torch.int8)}),
    ],
)
def test_static_activations_and_zero_points_are_refused(
    tmp_path: Path, weights: dict[str, Any], more: dict[str, torch.Tensor]
) -> None:
    held = {"weight": torch.ones(256, 384, dtype=torch.int8), "weight_scale": torch.ones(256, 1)}
    said = compressed("int-quantized", {**CHANNEL, **weights}, {**TOKEN, "dynamic": False})
    tensors = {f"{LAYER}.{suffix}": t for suffix, t in {**held, **more}.items()}
    model = write_checkpoint(tmp_path / "model", said, tensors)
    (problem,) = plan(model, 'match: "*", method: int8_channel', target=Target("cpu")).errors
    assert "is stored as int8 per channel" in str(problem)
    assert "requantize: true" in str(problem)


def test_bf16_is_quantized_to_within_half_a_step(tmp_path: Path) -> None:
    model = peer_checkpoint(tmp_path / "model", "bf16")
    made = layer_of(stream(model, "method: int8_channel", action="quantize"), LAYERS[0])
    weight = by_channel(made["weight"].numpy(), made["weight_scale"].numpy())
    source = original(LAYERS[0]).float().numpy()
    assert (np.abs(weight - source) <= made["weight_scale"].numpy() * 0.5001).all()
    # shared/data: INT8 by channel is 0.0085 from the original over the whole model
    assert relative_rms(torch.from_numpy(weight), original(LAYERS[0])) < 0.012
