from __future__ import annotations

from typing import Any

import pytest

from mixedprec_plugin.methods.registry import METHODS, bind


def stored(name: str, given: dict[str, Any], N: int, K: int) -> dict[str, tuple[str, Any]]:
    method, arguments = bind(name, given)
    tensors = METHODS[method].stored(arguments, N, K, "F16")
    return {suffix: (spec.dtype, spec.shape) for suffix, spec in tensors.items()}


# Shapes of q_proj of SmolLM2-135M (N = K = 576) as other tools write them, group size 64.
def test_awq_stores_what_autoawq_and_auto_round_write() -> None:
    assert stored("awq", {"group_size": 64}, 576, 576) == {
        "qweight": ("I32", (576, 72)),
        "qzeros": ("I32", (9, 72)),
        "scales": ("F16", (9, 576)),
    }


def test_gptq_stores_what_gptqmodel_writes() -> None:
    assert stored("gptq", {"group_size": 64}, 576, 576) == {
        "qweight": ("I32", (72, 576)),
        "qzeros": ("I32", (9, 72)),
        "scales": ("F16", (9, 576)),
        "g_idx": ("I32", (576,)),
    }


def test_gptq_packs_four_values_of_eight_bits_in_a_word() -> None:
    tensors = stored("gptq_int8", {}, 256, 384)
    assert tensors["qweight"] == ("I32", (96, 256))
    assert tensors["qzeros"] == ("I32", (3, 64))


@pytest.mark.parametrize("name", ["awq", "gptq"])
def test_group_size_of_minus_one_is_one_group(name: str) -> None:
    assert stored(name, {"group_size": -1}, 256, 384)["scales"] == ("F16", (1, 256))


def test_fp8_stores_one_scale_a_tensor() -> None:
    assert stored("fp8", {}, 576, 1536) == {
        "weight": ("F8_E4M3", (576, 1536)),
        "weight_scale": ("F32", ()),
    }


@pytest.mark.parametrize(("name", "dtype"), [("fp8_block", "F8_E4M3"), ("int8", "I8")])
def test_blocks_store_a_scale_for_a_partial_block_too(name: str, dtype: str) -> None:
    assert stored(name, {}, 576, 1536) == {
        "weight": (dtype, (576, 1536)),
        "weight_scale_inv": ("F32", (5, 12)),
    }


def test_fp8_channel_stores_what_llm_compressor_writes() -> None:
    assert stored("fp8_channel", {}, 576, 1536) == {
        "weight": ("F8_E4M3", (576, 1536)),
        "weight_scale": ("F32", (576, 1)),
    }


def test_int8_channel_stores_what_llm_compressor_writes() -> None:
    assert stored("int8_channel", {}, 576, 1536) == {
        "weight": ("I8", (576, 1536)),
        "weight_scale": ("F32", (576, 1)),
    }


def test_nvfp4_stores_what_modelopt_writes() -> None:
    made = {"weight": ("U8", (576, 768)), "weight_scale": ("F8_E4M3", (576, 96)),
            "weight_scale_2": ("F32", ())}  # fmt: skip
    assert stored("nvfp4", {}, 576, 1536) == made
    kept = stored("nvfp4", {"keep_input_scale": True}, 576, 1536)
    assert kept == made | {"input_scale": ("F32", ())}


def test_mxfp4_stores_what_compressed_tensors_writes() -> None:
    made = {"weight": ("U8", (576, 768)), "weight_scale": ("U8", (576, 48))}
    assert stored("mxfp4", {}, 576, 1536) == made


def test_static_fp8_stores_an_input_scale() -> None:
    assert stored("fp8", {"activation_scheme": "static"}, 16, 16)["input_scale"] == ("F32", ())


@pytest.mark.parametrize(("name", "dtype"), [("none", "F16"), ("bf16", "BF16"), ("fp16", "F16")])
def test_unquantized_stores_its_dtype_or_the_models(name: str, dtype: str) -> None:
    assert stored(name, {}, 3, 5) == {"weight": (dtype, (3, 5))}


def test_rounding_never_reaches_a_constructor() -> None:
    for name in ("awq", "gptq"):
        spec = METHODS[name]
        for platform in spec.config_classes:
            assert "rounding" not in spec.config_arguments(
                bind(name, {"rounding": "calibrated"})[1], platform
            )


def test_build_leaves_the_arguments_alone() -> None:
    for name, spec in METHODS.items():
        method, arguments = bind(name, {})
        spec.config_arguments(arguments, "cuda")
        assert (method, arguments) == bind(name, {})


def test_awq_builds_marlins_arguments_on_cuda_only() -> None:
    spec, arguments = METHODS["awq"], bind("awq", {})[1]
    assert set(spec.config_arguments(arguments, "cuda")) - set(
        spec.config_arguments(arguments, "cpu")
    ) == {
        "lm_head_quantized",
        "full_config",
    }
    assert spec.config_arguments(arguments, "cuda_fallback") == spec.config_arguments(
        arguments, "cpu"
    )


def test_gptq_without_a_choice_of_act_order_builds_without() -> None:
    assert METHODS["gptq"].config_arguments(bind("gptq", {})[1], "cuda")["desc_act"] is False
    assert (
        METHODS["gptq"].config_arguments(bind("gptq", {"desc_act": True})[1], "cuda")["desc_act"]
        is True
    )


def test_precision_follows_bits_then_quality() -> None:
    order: list[tuple[str, dict[str, Any]]] = [
        ("mxfp4", {}),
        ("gptq", {"group_size": -1}),
        ("gptq", {}),
        ("gptq", {"group_size": 32}),
        ("awq", {}),
        ("awq", {"group_size": 32}),
        ("nvfp4", {}),
        ("fp8", {}),
        ("fp8_channel", {}),
        ("fp8_block", {}),
        ("int8", {}),
        ("int8", {"weight_block_size": [64, 64]}),
        ("int8_channel", {}),
        ("gptq_int8", {}),
        ("gptq_int8", {"group_size": 64}),
        ("bf16", {}),
    ]
    ranks = []
    for name, given in order:
        method, arguments = bind(name, given)
        ranks.append(METHODS[method].rounding(arguments).rank)
    assert ranks == sorted(set(ranks))


@pytest.mark.parametrize(
    ("name", "given", "reason"),
    [
        ("fp8", {"activation_scheme": "static"}, "needs input scales"),
        ("gptq", {"desc_act": True}, "needs a source"),
    ],
)
def test_what_needs_calibration_cannot_be_quantized(
    name: str, given: dict[str, Any], reason: str
) -> None:
    method, arguments = bind(name, given)
    assert reason in METHODS[method].why_not_quantize(arguments)


def test_defaults_can_be_quantized() -> None:
    for name, spec in METHODS.items():
        assert spec.why_not_quantize(bind(name, {})[1]) == ""
