"""`method: auto` over other tools' formats, on cards that are played."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest

from tests.checkpoint.peers import FOLDERS
from tests.dryrun.matrix import prepare, run_module

MARLIN = ["jit:gptq_marlin_gemm"]
INT8 = ["triton:_per_token_quant_int8", "sgl_kernel:int8_scaled_mm"]
AWQ = ("AWQLinearMethod/AWQMarlinLinearScheme", MARLIN)
GPTQ = ("GPTQMarlinLinearMethod/GPTQMarlinLinearScheme", MARLIN)
WNA16 = ("CompressedTensorsLinearMethod/CompressedTensorsWNA16", MARLIN)
W8A8 = ("CompressedTensorsLinearMethod/CompressedTensorsW8A8Int8", INT8)
FP8 = "CompressedTensorsLinearMethod/CompressedTensorsW8A8Fp8"

# peer -> class and kernels, or what SGLang says instead, on an H100 and on an A100
RUNS: Mapping[str, Any] = {
    "autoawq-g64": AWQ,
    "autoround-awq-asym-g64": AWQ,
    "autoround-gptq-g64": GPTQ,
    "autoround-int8": W8A8,
    "autoround-native-g64": GPTQ,
    "autoround-sym-awqpack-g64": (
        "AWQLinearMethod/AWQLinearScheme",
        ["jit:awq_dequantize", "aten:mm"],
    ),
    "bf16": ("UnquantizedLinearMethod", ["aten:mm"]),
    "compressedtensors-nvfp4": (
        "CompressedTensorsLinearMethod/CompressedTensorsW4A16Fp4",
        MARLIN,
    ),
    "gptqmodel-asym-g64": "SGLang runs GPTQ only in Marlin's kernels",
    "gptqmodel-fp8-row": "SGLang's class for 'fp8' needs activation_scheme",
    "gptqmodel-gptq-g64": GPTQ,
    "llmcompressor-fp8-block": (FP8, ["jit:per_token_group_quant", "deep_gemm:fp8_fp4_gemm_nt"]),
    "llmcompressor-fp8-dynamic": (FP8, ["jit:per_token_quant_fp8", "sgl_kernel:fp8_scaled_mm"]),
    "llmcompressor-w4a16-asym-g64": WNA16,
    "llmcompressor-w4a16-g64": WNA16,
    "llmcompressor-w8a8-int8": W8A8,
    "modelopt-nvfp4": ("ModelOptFp4LinearMethod", MARLIN),
}
ON_A100: Mapping[str, Any] = {
    **RUNS,
    "llmcompressor-fp8-block": r"\(CompressedTensorsLinearMethod: Unsupported weight strategy=bloc",
    "llmcompressor-fp8-dynamic": (
        "CompressedTensorsLinearMethod/CompressedTensorsW8A16Fp8",
        MARLIN,
    ),
}


@pytest.fixture(scope="module", params=["H100", "A100"])
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Mapping[str, Any]]:
    folder = tmp_path_factory.mktemp("auto")
    prepare(folder)
    return request.param, run_module("auto", request.param, folder)


def test_every_peer_runs_in_sglangs_own_class_or_is_refused_in_its_words(
    results: tuple[str, Mapping[str, Any]],
) -> None:
    title, found = results
    assert set(RUNS) == set(FOLDERS)
    for peer, expected in (RUNS if title == "H100" else ON_A100).items():
        for kind in ("column", "merged", "qkv", "row"):
            for tp_size in (1, 2):
                got = found[f"{peer} {kind} {tp_size}"]
                assert not got.get("broken"), got["broken"]
                if isinstance(expected, str):
                    assert re.search(expected, got["refused"]), got["refused"]
                    assert got["refused"].startswith("block."), got["refused"]
                    continue
                runs_as, kernels = expected
                if (peer, kind) == ("bf16", "qkv"):
                    kernels = ["aten:addmm"]
                if (kind, tp_size) == ("row", 2):
                    kernels = [*kernels, "ranks:all_reduce"]
                assert (got.get("runs_as"), got.get("kernels")) == (runs_as, kernels), got


def test_tensors_keep_their_names_and_codes_their_dtypes(
    results: tuple[str, Mapping[str, Any]],
) -> None:
    _, found = results
    assert found["llmcompressor-w8a8-int8 column 1"]["parameters"] == {
        "weight": "int8 [2048, 1024]", "weight_scale": "float32 [2048, 1]"
    }  # fmt: skip
    assert found["llmcompressor-w4a16-asym-g64 row 2"]["parameters"] == {
        "weight_packed": "int32 [1024, 128]",
        "weight_scale": "bfloat16 [1024, 16]",
        "weight_zero_point": "int32 [128, 16]",
        "weight_shape": "int64 [2]",
    }
    assert found["autoround-native-g64 column 1"]["parameters"]["g_idx"] == "int32 [1024]"


def test_deepseeks_blocks_run_by_fp8s_own_class(results: tuple[str, Mapping[str, Any]]) -> None:
    title, found = results
    got = found["deepseek's blocks"]
    assert got.get("runs_as") == "Fp8LinearMethod", got
    assert (got["kernels"] == MARLIN) == (title == "A100")
    assert got["parameters"]["weight_scale_inv"] == "float32 [32, 8]"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ignored by its config", "config.json leaves it unquantized, which method: auto would go"),
        ("unknown quant_method", "SGLang has no class for quant_method 'none_such'"),
        ("no quant_method", "config.json names no quant_method"),
    ],
)
def test_config_that_sglang_does_not_read_is_an_error_that_names_the_layer(
    results: tuple[str, Mapping[str, Any]], name: str, message: str
) -> None:
    _, found = results
    assert found[name].get("refused", "").startswith("block.fc1: ")
    assert re.search(message, found[name]["refused"])


def test_config_of_another_type_is_refused_by_its_key(
    results: tuple[str, Mapping[str, Any]],
) -> None:
    refused = results[1]["config_groups of another type"].get("refused", "")
    assert "config.json: quantization_config.config_groups: 3 (expected an object" in refused


def test_shards_that_end_inside_a_block_are_refused(
    results: tuple[str, Mapping[str, Any]],
) -> None:
    title, found = results
    refused = found["ragged blocks"].get("refused", "")
    assert refused.startswith("block.qkv_proj: SGLang "), found["ragged blocks"]
    words = "is not divisible by" if title == "H100" else "Unsupported weight strategy=block"
    assert words in refused
