"""Consumers behind another source's norm: what they compute, in float64, and the original."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from mixedprec_plugin.compose.stream import VirtualCheckpoint
from mixedprec_plugin.methods import registry
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.plan.model import Plan, PlannedLayer
from mixedprec_plugin.quantize.codec import load_codec
from tests.plan.mixtures import ATTENTION, INPUT_NORM, mixed_plan, slice_checkpoint, slice_tensors
from tests.quantize.peers import config, numpy_layer
from tests.reference.dequantize import dequantize_checkpoint

V_OF_AWQ = 'match: "*.v_proj", method: awq, group_size: 64, source: awq'
K, V = f"{ATTENTION}k_proj", f"{ATTENTION}v_proj"


@pytest.fixture
def sources(tmp_path: Path) -> tuple[Path, Path]:
    return (
        slice_checkpoint(tmp_path / "model", "bf16"),
        slice_checkpoint(tmp_path / "awq", "autoawq-g64"),
    )


def weight_of(layer: PlannedLayer, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """A served layer's weight, float64 [N, K]."""
    own = {
        name.removeprefix(f"{layer.name}."): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{layer.name}.")
    }
    assert layer.scheme is not None
    if layer.method == "bf16":
        return own["weight"].double()
    codec = load_codec(registry.METHODS[layer.method].codec)
    return codec.read(own, layer.scheme.arguments).dequantize().double()


def error(plan: Plan, name: str) -> float:
    """Relative error of W (norm * x) as served, against the original's, over random x."""
    tensors = dict(iter(VirtualCheckpoint(plan)))
    base = slice_tensors("bf16")
    x = torch.randn(576, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    served = weight_of(plan.by_name[name], tensors) @ (
        tensors[f"{INPUT_NORM}.weight"].double()[:, None] * x
    )
    original = base[f"{name}.weight"].double() @ (
        base[f"{INPUT_NORM}.weight"].double()[:, None] * x
    )
    return float((served - original).norm() / original.norm())


def without_rescaling(plan: Plan) -> Plan:
    layers = tuple(dataclasses.replace(layer, rescale=None) for layer in plan.layers)
    return dataclasses.replace(plan, layers=layers)


# relative errors of the methods themselves on these weights: 2**-9 for bf16, 0.027 for FP8 and
# about 0.1 for four bits; behind an uneven norm, a little more
@pytest.mark.parametrize(
    ("method", "limit"),
    [
        ("bf16", 0.003),
        ("fp8", 0.04),
        ("gptq, group_size: 64", 0.16),
        ("awq, group_size: 64", 0.14),
    ],
)
def test_rescaled_consumer_computes_what_the_original_does(
    sources: tuple[Path, Path], method: str, limit: float
) -> None:
    model, awq = sources
    plan = mixed_plan(model, V_OF_AWQ, f'match: "*.k_proj", method: {method}', awq=awq)
    assert plan.by_name[K].rescale is not None
    assert error(plan, K) < limit
    assert error(plan, V) < 0.16
    assert error(without_rescaling(plan), K) > 0.5


def test_folded_layer_is_right_behind_the_models_norm_once_it_is_rescaled(
    sources: tuple[Path, Path],
) -> None:
    model, awq = sources
    plan = mixed_plan(model, 'match: "*.v_proj", method: bf16, source: awq', awq=awq)
    norms = [slice_tensors(f)[f"{INPUT_NORM}.weight"].double() for f in ("autoawq-g64", "bf16")]
    plain = dequantize_checkpoint(numpy_layer("autoawq-g64", V), config("autoawq-g64"))
    expected = torch.from_numpy(plain.astype(np.float64)) * (norms[0] / norms[1])
    served = dict(iter(VirtualCheckpoint(plan)))[f"{V}.weight"].double()
    # one rounding to float32, one to bfloat16
    distance = (served - expected).abs() / expected.abs().clamp(min=1e-30)
    assert float(distance.max()) < 2.0**-7.99
    assert error(plan, V) < 0.16
    assert error(without_rescaling(plan), V) > 0.5


def test_requantized_layer_is_right_behind_the_models_norm(sources: tuple[Path, Path]) -> None:
    model, awq = sources
    rule = 'match: "*.v_proj", method: fp8, requantize: true, source: awq'
    plan = mixed_plan(model, rule, awq=awq)
    assert error(plan, V) < 0.16
    assert error(without_rescaling(plan), V) > 0.5


def test_rescaling_counts_the_norm_as_it_is_served(sources: tuple[Path, Path]) -> None:
    model, awq = sources
    for dtype, limit in (("BF16", 0.003), ("F16", 0.0008)):
        rule = 'match: "*.k_proj", method: unquantized'
        plan = mixed_plan(model, V_OF_AWQ, rule, target=Target("cpu", dtype=dtype), awq=awq)
        assert error(plan, K) < limit


def test_gemmas_columns_are_rescaled_by_one_plus_w(tmp_path: Path) -> None:
    shifted = {
        folder: {f"{INPUT_NORM}.weight": slice_tensors(folder)[f"{INPUT_NORM}.weight"].float() - 1}
        for folder in ("bf16", "autoawq-g64")
    }
    model = slice_checkpoint(tmp_path / "model", "bf16", shifted["bf16"], model_type="gemma")
    awq = slice_checkpoint(tmp_path / "awq", "autoawq-g64", shifted["autoawq-g64"],
                           model_type="gemma")  # fmt: skip
    tensors = dict(iter(VirtualCheckpoint(mixed_plan(model, V_OF_AWQ, awq=awq))))
    served = tensors[f"{INPUT_NORM}.weight"].double() + 1
    base = slice_tensors("bf16")
    got = tensors[f"{K}.weight"].double() * served
    expected = base[f"{K}.weight"].double() * base[f"{INPUT_NORM}.weight"].double()
    assert float((got - expected).norm() / expected.norm()) < 0.003
