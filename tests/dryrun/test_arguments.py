"""The backend of experts that SGLang chooses on Blackwell, and what becomes of it under a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tests.dryrun.matrix import prepare, run_module

pytestmark = pytest.mark.parametrize("model", ["Qwen3-MoE", "DeepSeek-V3"])


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Mapping[str, Any]]:
    folder = tmp_path_factory.mktemp("arguments")
    prepare(folder)
    return run_module("arguments", "B200", folder)


@pytest.mark.parametrize("case", ["SGLang by itself", "unquantized", "fp8"])
def test_backend_is_sglangs_where_all_experts_run_in_it(
    found: Mapping[str, Mapping[str, Any]], model: str, case: str
) -> None:
    assert found[f"{model}, {case}"]["moe_runner_backend"] == "flashinfer_trtllm"


@pytest.mark.parametrize("case", ["gptq", "awq", "int8", "several"])
def test_each_method_chooses_where_one_does_not(
    found: Mapping[str, Mapping[str, Any]], model: str, case: str
) -> None:
    assert found[f"{model}, {case}"]["moe_runner_backend"] == "auto"


def test_quantization_of_the_checkpoint_is_not_the_plans(
    found: Mapping[str, Mapping[str, Any]], model: str
) -> None:
    expected = {"moe_runner_backend": "auto", "quantization": None}
    assert found[f"{model} in FP8, gptq"] == expected
