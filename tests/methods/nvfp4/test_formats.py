"""What is taken for NVFP4, what config.json says of it, and what SGLang refuses of a layer."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest

from mixedprec_plugin.methods.cards import find_gpu
from mixedprec_plugin.methods.interface import LayerShape, Target
from mixedprec_plugin.methods.registry import METHODS
from tests.methods import shapes
from tests.methods.formats import found
from tests.methods.shapes import linear

NAME = "model.layers.0.mlp.down_proj"
MODELOPT = {
    "weight": ("U8", (64, 48)),
    "weight_scale": ("F8_E4M3", (64, 6)),
    "weight_scale_2": ("F32", ()),
}
COMPRESSED = {
    "weight_packed": ("U8", (64, 48)),
    "weight_scale": ("F8_E4M3", (64, 6)),
    "weight_global_scale": ("F32", (1,)),
}
texts = partial(shapes.texts, "nvfp4")


def test_modelopts_tensors_are_served_as_they_are() -> None:
    plain = found(MODELOPT)
    assert (plain.method, plain.N, plain.K) == ("nvfp4", 64, 96)
    assert plain.arguments == {"keep_input_scale": False}
    static = found({**MODELOPT, "input_scale": ("F32", ())})
    assert static.arguments == {"keep_input_scale": True}
    assert static.obstacle == plain.obstacle == ""


def test_compressed_tensors_are_read() -> None:
    assert found(COMPRESSED).numbers == "fp4"
    static = found({**COMPRESSED, "input_global_scale": ("F32", (1,))})
    assert static.suffixes - found(COMPRESSED).suffixes == {"input_global_scale"}


@pytest.mark.parametrize(
    "changes",
    [
        {"weight_scale": ("F8_E4M3", (64, 3))},
        {"weight_scale": ("F32", (64, 6))},
        {"weight_scale_2": ("F32", (64,))},
        {"weight": ("I8", (64, 48))},
        {"weight": ("U8", (64, 49))},
    ],
)
def test_other_layouts_are_not_taken_for_it(changes: dict[str, Any]) -> None:
    other = found({**MODELOPT, **changes})
    assert not other.is_readable
    assert other.description == "modelopt nvfp4"


@pytest.mark.parametrize(
    "changes",
    [
        {"weight_scale": ("F8_E4M3", (64, 3))},
        {"weight_global_scale": ("F32", (64,))},
        {"weight_packed": ("U8", ())},
        {"weight_packed": ("U8", (64, 2, 48))},
    ],
)
def test_other_layouts_of_compressed_tensors_are_not_read(changes: dict[str, Any]) -> None:
    assert not found({**COMPRESSED, **changes}).is_readable


@pytest.mark.parametrize("algorithm", ["NVFP4", "W4A16_NVFP4"])
def test_what_modelopt_says_agrees(algorithm: str) -> None:
    said = {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"]}
    assert found(MODELOPT, said).disagreements == ()
    ignored = found(MODELOPT, {**said, "ignore": ["model.layers.0.mlp*"]})
    assert ignored.disagreements == ("is stored as nvfp4, config.json leaves it unquantized",)


def test_layers_of_a_mixed_checkpoint_are_told_by_name() -> None:
    said = {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": {NAME: {"quant_algo": "NVFP4", "group_size": 16}},
    }
    assert found(MODELOPT, said).disagreements == ()
    fp8 = {"weight": ("F8_E4M3", (64, 96)), "weight_scale": ("F32", ()), "input_scale": ("F32", ())}
    other = found(fp8, said, "model.layers.0.self_attn.o_proj")
    assert (other.method, other.disagreements) == ("fp8", ())


def test_experts_of_an_fp8_checkpoint_may_be_nvfp4() -> None:
    """As SGLang's `HybridFp8NvFp4Config` reads it (modelopt_quant.py:1731)."""
    said = {"quant_method": "fp8", "weight_block_size": [128, 128], "moe_quant_algo": "NVFP4"}
    assert found(MODELOPT, said, "model.layers.0.mlp.experts.3.up_proj").disagreements == ()
    assert found(MODELOPT, said, "model.layers.0.self_attn.o_proj").disagreements != ()


@pytest.mark.sglang
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_kept", [False, True])
def test_what_is_declared_is_what_sglang_reads(is_kept: bool) -> None:
    from sglang.srt.layers.quantization.modelopt_quant import ModelOptFp4Config

    declared = METHODS["nvfp4"].declare({"keep_input_scale": is_kept})
    config = ModelOptFp4Config.from_config(json.loads(json.dumps(declared)))
    assert config.is_checkpoint_nvfp4_serialized
    assert (config.is_w4a16, config.group_size) == (not is_kept, 16)


def test_gpus_before_ampere_are_refused() -> None:
    assert "expected 8.0 or more" in texts(linear(256, 256), "RTX 2080 Ti")[0]
    for gpu in ("A100", "RTX 3090", "RTX 4090", "H100", "B200", "RTX 5090"):
        assert texts(linear(256, 256), gpu) == []
        assert texts(linear(256, 256, is_expert=True), gpu) == []


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        # marlin_utils_fp4.py:149 pads what Marlin's tiles do not fit
        (linear(12, 16), ""),
        (linear(576, 1536), ""),
        (linear(64, 24), "K = 24 is not a multiple of 16"),
        (linear(64, 48, parallel="row", tp_size=2), "K = 24 per rank is not a multiple of 16"),
        (linear(256, 96, is_expert=True), "K = 96 is not a multiple of 64, which Marlin kernels"),
        (linear(96, 256, is_expert=True), "N = 96 is not a multiple of 128, which Marlin kernels"),
        (linear(64, 128, is_expert=True, shard_sizes=(64, 64)), ""),
    ],
)
def test_shapes_that_sglang_refuses(shape: LayerShape, message: str) -> None:
    made = texts(shape)
    assert len(made) == bool(message)
    assert all(message in text for text in made)


def test_experts_with_input_scales_are_refused_under_auto_where_the_gpu_has_fp4() -> None:
    """SGLang would run them in FlashInfer's kernels (modelopt_quant.py:3123)."""
    stored = found({**MODELOPT, "input_scale": ("F32", ())})
    faults_of = METHODS["nvfp4"].faults_as_stored
    assert faults_of is not None
    layer = linear(256, 256, is_expert=True)
    for gpu, count in (("H100", 0), ("B200", 1), ("RTX 5090", 1)):
        faults = faults_of(stored, layer, Target("cuda", gpu=find_gpu(gpu)))
        assert len(faults) == count, gpu
        assert all("does not lay weights out for" in fault.text for fault in faults)
        assert all(fault.remedy.startswith("write method: nvfp4") for fault in faults)
    assert faults_of(found(MODELOPT), layer, Target("cuda", gpu=find_gpu("B200"))) == []
    # the method leaves activations in 16 bits
    for kept in (False, True):
        assert texts(layer, "B200", keep_input_scale=kept) == []
