"""What is taken for humming, what config.json says of it, and what is refused of a layer."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest

from mixedprec_plugin.methods.interface import LayerShape
from mixedprec_plugin.methods.registry import METHODS, bind
from tests.methods import shapes
from tests.methods.formats import found
from tests.methods.shapes import linear

NAME = "model.layers.0.mlp.down_proj"
# 3 bits: 12 words are 128 codes
STORED = {"weight": ("I32", (64, 12)), "weight_scale": ("BF16", (64, 2))}
SAID = {"quant_method": "humming", "b_dtype": "uint3", "weight_scale_group_size": 64}
texts = partial(shapes.texts, "humming")


def test_what_is_declared_is_recognized() -> None:
    layer = found(STORED, SAID)
    assert (layer.method, layer.N, layer.K) == ("humming", 64, 128)
    assert layer.arguments == {"bits": 3, "group_size": 64}
    assert (layer.disagreements, layer.obstacle) == ((), "")
    assert METHODS["humming"].declare(layer.arguments) == SAID


@pytest.mark.parametrize("key", ["dtype", "weight_dtype"])
@pytest.mark.parametrize("dtype", ["uint3", "int3"])
def test_hummings_other_words_are_read(key: str, dtype: str) -> None:
    said = {"quant_method": "humming", key: dtype, "group_size": 64}
    assert found(STORED, said).arguments == {"bits": 3, "group_size": 64}


@pytest.mark.parametrize(
    ("specs", "said", "text"),
    [
        # nothing else tells the bits
        (STORED, {}, "scales beside a weight of I32"),
        (STORED, {**SAID, "b_dtype": "float4e2m1"}, "humming float4e2m1"),
        (STORED, {"quant_method": "humming"}, "humming of unknown bits"),
        ({**STORED, "weight_scale": ("BF16", (32, 2))}, SAID, "humming 3-bit"),
        ({**STORED, "weight": ("I32", (64, 13))}, SAID, "humming 3-bit"),
        ({**STORED, "weight_scale": ("BF16", (64, 3))}, SAID, "3 groups that do not divide K"),
    ],
)
def test_other_layouts_are_not_read(specs: Any, said: Any, text: str) -> None:
    layer = found(specs, said)
    assert not layer.is_readable
    assert text in layer.description or said == {}


def test_zero_points_are_not_served() -> None:
    said = {**SAID, "has_zero_point": True}
    layer = found({**STORED, "zero_point": ("I32", (6, 2))}, said)
    assert layer.method == ""
    assert "zero_point beside it" in layer.obstacle


def test_groups_that_the_method_has_not_are_read_and_not_served() -> None:
    layer = found({**STORED, "weight_scale": ("BF16", (64, 8))}, {**SAID, "group_size": 16})
    assert (layer.method, layer.is_readable, layer.facts["group_size"]) == ("", True, 16)


@pytest.mark.sglang
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", range(2, 9))
def test_what_is_declared_is_what_sglang_reads(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUMMING_DISABLE_PARALLEL_BUILD", "1")
    from sglang.srt.layers.quantization.humming import HummingConfig

    declared = METHODS["humming"].declare({"bits": bits, "group_size": 32})
    config = HummingConfig.from_config(json.loads(json.dumps(declared)))
    made = config.get_quant_config_for_layer(NAME, "linear")
    schema, inputs = made.weight_schema, made.input_schema
    assert (str(schema.b_dtype), schema.weight_scale_group_size) == (f"uint{bits}", 32)
    assert (schema.weight_scale_type.name, schema.has_zero_point) == ("GROUP", False)
    # activations stay in 16 bits
    assert (inputs.a_dtype, inputs.input_scale_group_size) == (None, 0)


def test_every_gpu_runs_it_in_float16_and_from_ampere_on_in_bfloat16() -> None:
    for gpu in ("A100", "RTX 3090", "RTX 4090", "H100", "B200", "RTX 5090"):
        assert texts(linear(256, 256), gpu) == []
    assert texts(linear(256, 256, dtype="F16"), "RTX 2080 Ti") == []
    assert "does not run in bfloat16 on this GPU" in texts(linear(256, 256), "RTX 2080 Ti")[0]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        # what the kernel's tiles do not fit is padded (quantization/humming.py:951)
        (linear(8, 128), ""),
        (linear(12, 128), "N = 12 is not a multiple of 8, the outputs that humming's kernel"),
        (linear(4, 128, shard_sizes=(4, 4)), ""),
        (linear(64, 192), "group_size 128 does not divide K = 192"),
        (linear(64, 256, parallel="row", tp_size=2), ""),
        (linear(64, 384, parallel="row", tp_size=2), "group_size 128 does not divide K = 192 per"),
        (
            linear(256, 256, is_expert=True),
            "served in linear layers alone: its kernels for experts were not tr",
        ),
    ],
)
def test_shapes_that_are_refused(shape: LayerShape, message: str) -> None:
    made = texts(shape)
    assert len(made) == bool(message)
    assert all(message in text for text in made)


def test_a_smaller_group_is_the_first_remedy() -> None:
    assert "use group_size: 64" in texts(linear(64, 192))[0]


@pytest.mark.parametrize(
    ("stored", "arguments", "reason"),
    [
        ({"bits": 4, "symmetric": True}, {"bits": 4}, ""),
        ({"bits": 4, "symmetric": True}, {"bits": 3}, "it has 4 bits"),
        ({"bits": 4, "symmetric": False}, {"bits": 4}, "it is asymmetric, and humming is served"),
    ],
)
def test_integers_of_others_are_repacked(stored: Any, arguments: Any, reason: str) -> None:
    specs = {
        "weight_packed": ("I32", (64, 16)),
        "weight_scale": ("BF16", (64, 1)),
        "weight_shape": ("I64", (2,)),
    }
    if not stored["symmetric"]:
        specs["weight_zero_point"] = ("I32", (8, 1))
    said = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4, "type": "int", "group_size": 128, "strategy": "group",
                    "symmetric": stored["symmetric"],
                },
            }
        },
    }  # fmt: skip
    given = bind("humming", {"group_size": 128, **arguments})[1]
    made = METHODS["humming"].why_not_repack(found(specs, said), given, {}, False)
    assert made is not None
    assert reason in made
    assert bool(made) == bool(reason)
