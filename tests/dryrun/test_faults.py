"""A dry run that calls a fault good would prove nothing."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from typing import Any

import pytest

from tests.dryrun.matrix import prepare, run_module

pytestmark = pytest.mark.skipif(
    shutil.which("gcc") is None, reason="needs gcc, for the driver's stub"
)


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
        ("config class for the CPU", "mixedprec_plugin.cpu.gptq_linear"),
        ("a forward through Python of ours", r"a forward calls into \['mixedprec_plugin.names'\]"),
        ("Triton kernel without instructions on the card", "fp8e4nv"),
    ],
)
def test_dry_run_breaks(results: Mapping[str, Any], fault: str, text: str) -> None:
    assert re.search(text, results[fault]["broken"]), results[fault]["broken"]
