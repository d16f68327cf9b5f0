"""A dry run that calls a fault good would prove nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest

from tests.dryrun.matrix import prepare, run_module


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    folder = tmp_path_factory.mktemp("faults")
    prepare(folder)
    return run_module("faults", "A100", folder)


def test_cell_without_a_fault_is_good(results: Mapping[str, Any]) -> None:
    cell = results["no fault"]
    assert (cell["refused"], cell["broken"]) == ("", "")
    assert cell["kernels"] == ["jit:gptq_marlin_gemm"]


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("scales dropped", "layer.scales: 0 of 16,384 elements were filled"),
        ("one shard's scales dropped", "layer.scales: 24,576 of 32,768 elements were filled"),
        (
            "wrong config class",
            "AWQMarlinConfig of SGLang .* does not take the argument 'desc_act'",
        ),
        (
            "constructor argument renamed",
            "GPTQMarlinConfig of SGLang .* does not take the argument 'num_bits'",
        ),
    ],
)
def test_package_refuses(results: Mapping[str, Any], fault: str, text: str) -> None:
    assert not results[fault]["broken"]
    assert re.search(text, results[fault]["refused"]), results[fault]["refused"]


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("scales transposed", "exceeds dimension size"),
        ("scales in another dtype", r"torch.bfloat16 \[16, 8\] into torch.float32 \[16, 8\]"),
        ("codes in another dtype", "Downcasting not allowed"),
        ("a row too few", "qweight: 262016 elements for 262144"),
        ("config class for the CPU", "mixedprec_plugin.methods.gptq.sglang"),
        ("a forward through Python of ours", r"a forward calls into \['mixedprec_plugin.names'\]"),
        ("Triton kernel without instructions on the card", "fp8e4nv"),
    ],
)
def test_dry_run_breaks(results: Mapping[str, Any], fault: str, text: str) -> None:
    assert re.search(text, results[fault]["broken"]), results[fault]["broken"]


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        # layers/quantization/marlin_utils_fp8.py:98: the first to look at the shape is the kernel
        ("FP8 in Marlin, ragged", r"prepare_fp8_layer_for_marlin.*marlin_checks.*assert size_n % "),
        # gpu/quantization/gptq_kernels.py:89 asks for it, and goes on
        ("GPTQ in Marlin, ragged", r"gptq_kernels.*marlin_checks.*assert size_n % _TILE_N"),
        # awq/awq.py:368 looks at the whole layer, awq_marlin.py:49 at its share
        ("AWQ, its share too narrow", "output_size_per_partition = 32 is not divisible by"),
        # awq/awq.py:139, and no word of it
        ("AWQ experts, plain", "^UnquantizedFusedMoEMethod$"),
        # models/deepseek_common/utils.py:104
        ("AWQ absorbed", "No module named 'sglang.kernel_api_logging'"),
        # layers/moe/topk.py:2021 does not ask the GPU
        ("DeepSeek's routing", "fused_topk_deepseek does not support .* with capability 80"),
        # base_config.py:49: only experts have it
        ("AWQ, new weights", "qweight has no weight_loader"),
        ("GPTQ, new weights", "qweight has no weight_loader"),
    ],
)
def test_sglang_by_itself_still_fails_so(results: Mapping[str, Any], fault: str, text: str) -> None:
    assert re.search(text, results["stock"][fault], re.DOTALL), results["stock"][fault]


def test_sglang_falls_back_where_the_whole_layer_does_not_fit(results: Mapping[str, Any]) -> None:
    assert results["stock"]["AWQ, too narrow as a whole"] == ""
