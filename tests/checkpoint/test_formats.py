"""Formats that other tools wrote, told from their tensors and held against their configs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from mixedprec_plugin.checkpoint.headers import StoredTensor, read_header
from mixedprec_plugin.methods.recognition import recognize
from mixedprec_plugin.methods.stored import StoredFormat
from tests.checkpoint.peers import FOLDERS, quantization_config
from tests.quantize.peers import FILE, LAYERS, PEERS

NAME = LAYERS[0]
N, K = 192, 576
AWQ = {"bits": 4, "group_size": 64, "zero_point": True}
GPTQ = {"bits": 4, "group_size": 64, "sym": True, "desc_act": False}
# folder -> (method, its arguments, family, description); from the table of tests/data/peers and
# each folder's quantization_config
DETECTED: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "autoawq-g64": ("awq", AWQ, "awq", "awq 4-bit group 64"),
    "autoround-awq-asym-g64": ("awq", AWQ, "awq", "awq 4-bit group 64"),
    "autoround-sym-awqpack-g64": ("awq", AWQ, "awq", "awq 4-bit group 64"),
    "autoround-gptq-g64": ("gptq", GPTQ, "gptq", "gptq 4-bit group 64"),
    "gptqmodel-gptq-g64": ("gptq", GPTQ, "gptq", "gptq 4-bit group 64"),
    "autoround-native-g64": ("gptq", GPTQ, "gptq", "gptq 4-bit group 64 without g_idx"),
    "gptqmodel-asym-g64": ("", {}, "gptq", "gptq 4-bit group 64 asymmetric"),
    "gptqmodel-fp8-row": ("", {}, "fp8", "fp8 per channel (reciprocal scales)"),
    "llmcompressor-fp8-block": ("", {}, "fp8", "fp8 block [128, 128] (float-quantized)"),
    "llmcompressor-fp8-dynamic": ("fp8_channel", {}, "fp8", "fp8 per channel (float-quantized)"),
    "llmcompressor-w8a8-int8": ("int8_channel", {}, "int8", "int8 per channel (int-quantized)"),
    "autoround-int8": ("int8_channel", {}, "int8", "int8 per channel (int-quantized)"),
    "llmcompressor-w4a16-g64": ("", {}, "pack-quantized", "pack-quantized 4-bit group 64"),
    "llmcompressor-w4a16-asym-g64": (
        "", {}, "pack-quantized", "pack-quantized 4-bit group 64 asymmetric"
    ),
    "modelopt-nvfp4": (
        "nvfp4", {"keep_input_scale": True}, "nvfp4", "nvfp4 with input scales"
    ),
    "compressedtensors-nvfp4": ("", {}, "nvfp4-pack-quantized", "nvfp4-pack-quantized"),
    "bf16": ("bf16", {"dtype": "bfloat16"}, "float", "bfloat16"),
}  # fmt: skip


def stored_layer(folder: str, layer: str = NAME) -> dict[str, StoredTensor]:
    header = read_header(PEERS / folder / FILE)
    return {
        name.rpartition(".")[2]: tensor
        for name, tensor in header.items()
        if name.startswith(f"{layer}.")
    }


def tensors(**specs: tuple[str, tuple[int, ...]]) -> dict[str, StoredTensor]:
    return {
        suffix: StoredTensor(f"{NAME}.{suffix}", dtype, shape, Path("model.safetensors"), 0, 0)
        for suffix, (dtype, shape) in specs.items()
    }


def detect(
    layer: dict[str, StoredTensor], config: dict[str, Any], name: str = NAME
) -> StoredFormat:
    found = recognize(layer, config, name)
    assert found is not None
    return found


def test_every_peer_has_an_expectation() -> None:
    assert set(DETECTED) == set(FOLDERS)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_peer_is_detected_and_agrees_with_its_config(folder: str, layer: str) -> None:
    found = detect(stored_layer(folder, layer), quantization_config(folder), layer)
    method, arguments, family, description = DETECTED[folder]
    assert (found.method, dict(found.arguments)) == (method, arguments)
    assert (found.encoding, found.description, found.N, found.K) == (family, description, N, K)
    assert found.disagreements == ()
    assert found.is_readable
    assert found.suffixes == set(stored_layer(folder, layer))


@pytest.mark.parametrize("folder", ["autoround-native-g64"])
def test_missing_g_idx_is_filled(folder: str) -> None:
    assert detect(stored_layer(folder), quantization_config(folder)).filled.keys() == {"g_idx"}


def test_norm_has_no_format() -> None:
    layer = stored_layer("autoawq-g64", "model.layers.0.input_layernorm")
    assert recognize(layer, quantization_config("autoawq-g64"), "x.input_layernorm") is None


class TestConventions:
    def test_gptq_v2_is_dequantized_and_not_served(self) -> None:
        folder = "gptqmodel-gptq-g64"
        config = {**quantization_config(folder), "checkpoint_format": "gptq_v2"}
        found = detect(stored_layer(folder), config)
        assert (found.method, found.description) == ("", "gptq 4-bit group 64 v2")
        assert found.how["checkpoint_format"] == "gptq_v2"

    def test_act_order_needs_its_g_idx(self) -> None:
        config = {**quantization_config("gptqmodel-gptq-g64"), "desc_act": True}
        found = detect(stored_layer("gptqmodel-gptq-g64"), config)
        assert found.arguments["desc_act"] is True
        assert found.description == "gptq 4-bit group 64 act order"
        lost = {k: v for k, v in stored_layer("gptqmodel-gptq-g64").items() if k != "g_idx"}
        found = detect(lost, config)
        assert not found.is_readable
        assert found.disagreements == ("lacks g_idx beside qweight, qzeros, scales",)

    def test_deepseeks_scale_inv_multiplies_and_is_served(self) -> None:
        layer = tensors(weight=("F8_E4M3", (N, K)), weight_scale_inv=("F32", (2, 5)))
        config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        found = detect(layer, config)
        assert found.method == "fp8"
        assert found.arguments["weight_block_size"] == [128, 128]
        assert found.how["reciprocal"] is False
        inverse = detect(layer, {**config, "weight_scale_semantics": "inverse"})
        assert (inverse.method, inverse.how["reciprocal"]) == ("", True)

    def test_scale_inv_of_unknown_direction_is_not_guessed(self) -> None:
        layer = stored_layer("gptqmodel-fp8-row")
        found = detect(layer, {"quant_method": "fp8"})
        assert not found.is_readable
        assert found.description == "fp8 per channel with a weight_scale_inv of unknown direction"

    def test_scalar_scale_inv_is_read_where_the_config_tells_who_wrote_it(self) -> None:
        layer = tensors(weight=("F8_E4M3", (N, K)), weight_scale_inv=("F32", ()))
        assert not detect(layer, {}).is_readable
        found = detect(layer, {"quant_method": "fp8"})
        assert (found.method, found.description) == ("", "fp8 per tensor")
        assert found.how["reciprocal"] is False
        config = {"quant_method": "fp8", "weight_scale_method": "tensor"}
        assert not detect(layer, config).is_readable

    def test_fp8_per_channel_is_served_where_activations_may_have_a_scale_a_token(self) -> None:
        layer = tensors(weight=("F8_E4M3", (N, K)), weight_scale=("F32", (N, 1)))
        for method in (None, "fp8", "fp8_channel", "w8a8_fp8"):
            found = detect(layer, {"quant_method": method} if method else {})
            assert (found.method, found.arguments) == ("fp8_channel", {})
            assert (found.description, found.disagreements) == ("fp8 per channel", ())
        flat = {**layer, **tensors(weight_scale=("F32", (N,)))}
        static = {**layer, **tensors(input_scale=("F32", (1,)))}
        for other in (flat, static):
            assert detect(other, {}).method == ""

    @pytest.mark.parametrize(
        "inputs", [None, {"dynamic": False}, {"dynamic": True, "group_size": 128}]
    )
    def test_fp8_per_channel_beside_other_activations_has_no_method(self, inputs: object) -> None:
        config = quantization_config("llmcompressor-fp8-dynamic")
        config["config_groups"]["group_0"]["input_activations"] = inputs
        found = detect(stored_layer("llmcompressor-fp8-dynamic"), config)
        assert found.method == ""
        assert found.is_readable

    def test_fp8_per_tensor_is_served_with_its_activation_scheme(self) -> None:
        scale = {"weight": ("F8_E4M3", (N, K)), "weight_scale": ("BF16", (1,))}
        for more, scheme in (({}, "dynamic"), ({"input_scale": ("F32", (1,))}, "static")):
            found = detect(tensors(**scale, **more), {})
            assert (found.method, found.description) == ("fp8", "fp8 per tensor")
            assert found.arguments["activation_scheme"] == scheme
            assert found.suffixes == {*scale, *more}

    def test_fp8_per_tensor_beside_activations_in_16_bits_has_no_method(self) -> None:
        # SGLang's compressed_tensors.py runs it in CompressedTensorsW8A16Fp8
        config = quantization_config("llmcompressor-fp8-dynamic")
        group = config["config_groups"]["group_0"]
        group["weights"]["strategy"] = "tensor"
        layer = tensors(weight=("F8_E4M3", (N, K)), weight_scale=("BF16", (1,)))
        assert detect(layer, config).method == "fp8"
        group["input_activations"] = None
        found = detect(layer, config)
        assert (found.method, found.is_readable) == ("", True)

    def test_int8_blocks_are_served(self) -> None:
        layer = tensors(weight=("I8", (N, K)), weight_scale_inv=("BF16", (2, 5)))
        found = detect(layer, {})
        assert (found.method, found.description) == ("blockwise_int8", "int8 block [128, 128]")

    def test_asymmetric_naive_int8_is_dequantized(self) -> None:
        layer = tensors(
            weight=("I8", (N, K)), weight_scale=("F16", (N, 9)), weight_zero_point=("I8", (N, 9))
        )
        found = detect(layer, {})
        assert (found.method, found.description) == ("", "int8 group 64 (asymmetric)")
        assert found.how["block"] == [1, 64]

    def test_torchao_codes_with_row_scales_are_dequantized(self) -> None:
        layer = tensors(_weight_qdata=("F8_E4M3", (N, K)), _weight_scale=("F32", (N, 1)))
        found = detect(layer, {"quant_method": "torchao"})
        assert (found.description, found.encoding) == ("torchao fp8 per channel", "torchao")
        assert found.codec
        assert (found.N, found.K) == (N, K)


@pytest.mark.parametrize(
    ("layer", "config", "description"),
    [
        (tensors(weight=("F8_E4M3", (N, K))), {}, "fp8 without weight_scale"),
        (tensors(qweight=("I32", (72, N)), qzeros=("I32", (9, 24))), {},
         "a qweight without scales"),
        (tensors(weight=("F8_E4M3", (N, K)), weight_scale=("F32", (3, 7))), {},
         "fp8 with weight_scale of [3, 7], which fits no usual block size"),
        (tensors(weight=("F8_E4M3", (N, K)), weight_scale=("F8_E8M0", (N, 18))), {},
         "fp8 with weight_scale of F8_E8M0"),
        (tensors(weight=("U8", (N, K // 2)), weight_scale=("F8_E4M3", (N, 18)),
                 weight_scale_2=("F32", ())), {}, "modelopt nvfp4"),
        (tensors(weight=("U8", (N // 2, K)), weight_scale=("F32", (N, 4)),
                 weight_scale_2=("F32", ())),
         {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "modelopt W4A8_AWQ"),
        (tensors(weight_packed=("U8", (N, K // 2)), weight_scale=("U8", (N, 9))), {},
         "mxfp4-pack-quantized [192, 288] with weight_scale U8 [192, 9]"),
        (tensors(weight=("I8", (N, K)), SCB=("F32", (N,))), {}, "bitsandbytes 8-bit"),
        (tensors(weight_packed=("I32", (N, 72)), weight_scale=("BF16", (N, 9))), {},
         "pack-quantized in bits that config.json does not tell"),
        (tensors(qweight=("I32", (54, N)), qzeros=("I32", (9, 18)), scales=("F16", (9, N)),
                 g_idx=("I32", (K,))), {"quant_method": "gptq", "bits": 3}, "gptq 3-bit"),
        (tensors(qweight=("I32", (72, N)), qzeros=("I32", (9, 24)), scales=("F16", (9, N))),
         {"quant_method": "gptq", "checkpoint_format": "marlin"},
         "gptq 4-bit packed as marlin"),
        (tensors(qweight=("I32", (N, 72)), qzeros=("I32", (N, 2)), scales=("F16", (N, 16))),
         {"quant_method": "awq", "version": "gemv"}, "awq gemv"),
        (tensors(weight=("I8", (N, K // 2)), weight_scale=("F32", (N, 9))),
         {"quant_method": "w4afp8"}, "w4afp8"),
        (tensors(weight_packed=("I32", (N, 72)), weight_scale=("BF16", (N, 9))),
         {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"x": {
             "targets": ["Linear"],
             "weights": {"num_bits": 8, "strategy": "group", "group_size": 64}}}},
         "pack-quantized 8-bit in groups of 32, not 64, or in other bits"),
        (tensors(_weight_qdata=("I8", (N, K // 2)), _weight_scale=("BF16", (9, N))),
         {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig"}}},
         "torchao I8 [192, 288]"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named(
    layer: dict[str, StoredTensor], config: dict[str, Any], description: str
) -> None:
    found = detect(layer, config)
    assert found.description == description
    assert not found.is_readable


def test_missing_scale_is_a_disagreement() -> None:
    found = detect(tensors(weight=("F8_E4M3", (N, K))), {})
    assert found.disagreements == ("lacks weight_scale beside weight",)


@pytest.mark.parametrize("how", ["weight_shape", "group_size"])
def test_bits_that_config_json_does_not_say_follow_from_k(how: str) -> None:
    layer, config = stored_layer("llmcompressor-w4a16-g64"), {}
    if how == "group_size":
        config = quantization_config("llmcompressor-w4a16-g64")
        del config["config_groups"]["group_0"]["weights"]["num_bits"], layer["weight_shape"]
    found = detect(layer, config)
    assert (found.description, found.K) == ("pack-quantized 4-bit group 64", K)


def test_wrong_bits_of_pack_quantized_show_in_its_group() -> None:
    folder = "llmcompressor-w4a16-g64"
    config = quantization_config(folder)
    config["config_groups"]["group_0"]["weights"]["num_bits"] = 8
    found = detect(stored_layer(folder), config)
    assert found.disagreements == ("is stored with group_size 32, config.json says 64",)


def test_format_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        detect(stored_layer("bf16"), {}).N = 1  # type: ignore[misc]
