"""What is taken for MXFP4, what config.json says of it, and what SGLang refuses of a layer."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from typing import Any

import pytest

from mixedprec_plugin.cli.inspect import InspectedLayer
from mixedprec_plugin.methods.interface import LayerShape, Target
from mixedprec_plugin.methods.recognition import faults_as_stored
from mixedprec_plugin.methods.registry import METHODS
from tests.methods import shapes
from tests.methods.formats import found
from tests.methods.shapes import linear

NAME = "model.layers.0.mlp.experts.3.down_proj"
OWN = {"weight": ("U8", (64, 48)), "weight_scale": ("U8", (64, 3))}
COMPRESSED = {"weight_packed": ("U8", (64, 48)), "weight_scale": ("U8", (64, 3))}
texts = partial(shapes.texts, "mxfp4")


def test_its_tensors_are_served_as_they_are() -> None:
    plain = found(OWN, name=NAME)
    assert (plain.method, plain.N, plain.K, plain.arguments) == ("mxfp4", 64, 96, {})
    assert plain.obstacle == ""


def test_compressed_tensors_are_read() -> None:
    stored = found(COMPRESSED, name=NAME)
    assert (stored.method, stored.numbers, stored.facts) == ("", "fp4", {"group_size": 32})
    assert stored.suffixes == COMPRESSED.keys()


@pytest.mark.parametrize(
    "changes",
    [
        {"weight_scale": ("U8", (64, 6))},
        {"weight_scale": ("F8_E4M3", (64, 3))},
        {"weight_packed": ("U8", (64, 2, 48))},
        {"weight_packed": ("U8", (64, 40))},
        {"weight_zero_point": ("U8", (64, 3))},
    ],
)
def test_other_layouts_are_not_read(changes: dict[str, Any]) -> None:
    other = found({**COMPRESSED, **changes}, name=NAME)
    assert not other.is_readable
    assert other.description.startswith("mxfp4-pack-quantized [64, ")


def test_a_scale_that_is_missing_is_named() -> None:
    assert "without weight_scale" in found({"weight_packed": ("U8", (64, 48))}).description


def test_what_compressed_tensors_says_agrees() -> None:
    weights = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
    said = {
        "quant_method": "compressed-tensors",
        "format": "mxfp4-pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    assert found(COMPRESSED, said, NAME).disagreements == ()
    weights["group_size"] = 16
    assert found(COMPRESSED, said, NAME).disagreements != ()


@pytest.mark.sglang
@pytest.mark.filterwarnings("ignore")
def test_what_is_declared_is_what_sglang_reads() -> None:
    from sglang.srt.layers.quantization.mxfp4 import Mxfp4Config

    declared = json.loads(json.dumps(METHODS["mxfp4"].declare({})))
    assert Mxfp4Config.from_config(declared).is_checkpoint_mxfp4_serialized
    assert found(OWN, declared, NAME).disagreements == ()


def test_gpus_before_hopper_are_refused() -> None:
    """`RuntimeError("MXFP4 Marlin requires SM90+.")` (mxfp4.py:655)."""
    expert = linear(256, 256, is_expert=True)
    for gpu in ("A100", "RTX 3090", "RTX 4090"):
        (text,) = texts(expert, gpu)
        assert "(expected 9.0 or more)" in text
        assert "use method: nvfp4" in text
    for gpu in ("H100", "B200", "RTX 5090"):
        assert texts(expert, gpu) == []


@pytest.mark.parametrize("layout", [OWN, COMPRESSED])
def test_linear_layers_that_are_stored_so_have_no_method(layout: dict[str, Any]) -> None:
    """AMD's Quark writes some; what they were told to be written as was refused."""
    stored = found(layout, name="model.layers.0.mlp.up_proj")
    assert (stored.method, stored.is_readable) == ("", True)
    assert InspectedLayer("model.layers.0.mlp.up_proj", "linear", stored, {}).use == "dequantize"
    assert found(OWN, name=NAME).method == "mxfp4"


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_linear_layers_are_refused(device: str) -> None:
    (text,) = texts(linear(256, 256), device=device)
    assert text == ("SGLang runs MXFP4 in experts alone, not in linear layers; use method: nvfp4")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        # gpt-oss, of which Marlin's tiles are padded: 2880 inputs and as many inner features
        (linear(2880, 2880), ""),
        (linear(2880, 2880, parallel="row"), ""),
        (linear(2880, 2880, tp_size=4), "N = 720 per rank is not a multiple of 32, the block"),
        (linear(2880, 2880, parallel="row", tp_size=4), "K = 720 per rank is not a multiple of 32"),
        (linear(96, 128, shard_sizes=(96, 96)), ""),
        (linear(256, 96), "K = 96 is not a multiple of 64, which Marlin kernels for experts need"),
        (linear(96, 256, parallel="row"), "N = 96 is not a multiple of 64, which Marlin kernels"),
        (linear(256, 48, parallel="row"), "K = 48 is not a multiple of 32, the block that has"),
    ],
)
def test_shapes_that_sglang_refuses(shape: LayerShape, message: str) -> None:
    made = texts(as_expert(shape))
    assert len(made) == bool(message)
    assert all(message in text for text in made)


def as_expert(shape: LayerShape) -> LayerShape:
    return dataclasses.replace(shape, is_expert=True)


def faults_under_auto(tensors: dict[str, Any], shape: LayerShape) -> list[Any]:
    return faults_as_stored(found(tensors, name=NAME), as_expert(shape), Target())


def test_under_auto_they_are_served_as_they_are() -> None:
    assert faults_under_auto(OWN, linear(64, 96, parallel="row")) == []
    (fault,) = faults_under_auto(OWN, linear(96, 96, parallel="row"))
    assert "N = 96 is not a multiple of 64" in fault.text


def test_compressed_tensors_are_refused_under_auto_as_sglang_would_serve_sixteen_bits() -> None:
    """Without a backend it calls `upcast_from_mxfp` (mxfp4.py:1116)."""
    (fault,) = faults_under_auto(COMPRESSED, linear(64, 96, parallel="row"))
    assert "dequantize them while it loads" in fault.text
    assert fault.remedy == "write method: mxfp4"
