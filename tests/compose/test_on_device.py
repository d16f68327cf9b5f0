"""Weights that are quantized where their codes go, against those of the CPU."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch

from mixedprec_plugin.checkpoint.reader import TORCH_DTYPES
from mixedprec_plugin.compose import on_device
from mixedprec_plugin.compose.on_device import DeviceRounding
from mixedprec_plugin.compose.parts import compose_parts
from mixedprec_plugin.compose.stream import VirtualCheckpoint, compose_layer
from mixedprec_plugin.quantize.rounding import divided
from tests.compose.test_parts import EVERY, made, model
from tests.tensors import raw

__all__ = ["model"]
LAYERS = ("mlp.up_proj", "mlp.down_proj", "self_attn.q_proj")
QUANTIZED = [scheme for scheme in EVERY if scheme != "unquantized"]


@pytest.mark.parametrize("compose", [compose_layer, compose_parts])
@pytest.mark.parametrize("scheme", QUANTIZED)
def test_tensors_are_those_of_the_cpu(model: Path, scheme: str, compose: object) -> None:
    plan = made(model, scheme)
    rounding = DeviceRounding(torch.device("cpu"))
    assert callable(compose)
    stream = VirtualCheckpoint(plan, compose=functools.partial(compose, quantize=rounding))
    expected = dict(iter(VirtualCheckpoint(plan)))
    for name, tensor in stream:
        assert torch.equal(raw(tensor.clone()), raw(expected.pop(name).contiguous())), name
    assert not expected
    weights = [layer.inputs["weight"] for layer in plan.layers if layer.action == "quantize"]
    # of a group index a tile is made anew
    assert rounding.num_bytes >= sum(weight.num_bytes for weight in weights) > 0


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_every_step_and_result_is_on_the_device(
    model: Path, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # fake tensors refuse an operation on tensors of two devices, and a GPU is not asked for
    from tests.dryrun.fake_device import fake_card

    def moved(_: DeviceRounding, weight: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(weight, device="cuda")

    monkeypatch.setattr(DeviceRounding, "_moved", moved)
    plan = made(model, scheme)
    for name in LAYERS:
        layer = plan.by_name[f"model.layers.0.{name}"]
        weight = torch.empty(layer.inputs["weight"].shape, dtype=torch.bfloat16, device="cpu")
        with fake_card():
            found = DeviceRounding(torch.device("cuda"))(layer, weight, plan.target)
        assert {
            suffix: (t.device.type, t.dtype, tuple(t.shape)) for suffix, t in found.items()
        } == {
            suffix: ("cuda", TORCH_DTYPES[spec.dtype], spec.shape)
            for suffix, spec in layer.outputs.items()
        }


def test_weights_over_the_bound_stay_on_the_cpu(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = 384 * 256 * 2
    monkeypatch.setattr(on_device, "MAX_BYTES", largest - 1)
    rounding = DeviceRounding(torch.device("cpu"))
    stream = VirtualCheckpoint(
        made(model, "awq, group_size: 32"),
        compose=functools.partial(compose_layer, quantize=rounding),
    )
    num_mlp_bytes = 3 * largest
    all_bytes = sum(x.inputs["weight"].num_bytes for x in stream.layers if x.action == "quantize")
    assert list(stream)
    assert rounding.num_bytes == all_bytes - num_mlp_bytes


@pytest.mark.parametrize("number", [15, 7.5, 8.5, 127.0, 448.0])
def test_division_is_rounded_once(number: float) -> None:
    values = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    expected = values.numpy() / np.float32(number)
    assert np.array_equal(divided(values, number).numpy(), expected)
    # as torch divides on CUDA: in a quarter of all cases another number
    assert not np.array_equal(values.numpy() * (np.float32(1) / np.float32(number)), expected)
