"""Experts behind DeepEP on a played H100: as by SGLang's own config of a model in block FP8."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tests.dryrun.matrix import prepare, run_module


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    folder = tmp_path_factory.mktemp("deepep")
    prepare(folder)
    return run_module("deepep", "H100", folder)


def test_block_fp8_of_a_preset_runs_as_sglangs_own(results: Mapping[str, Any]) -> None:
    stock, ours = results["SGLang"], results["fp8_block"]
    assert "broken" not in stock, stock["broken"]
    assert "broken" not in ours, ours["broken"]
    assert (stock["class"], stock["runner"]) == ("Fp8MoEMethod", "deep_gemm")
    assert {name for name in stock["kernels"] if name.startswith("deep_gemm:")}
    # SGLang would have sent a preset's to kernels that are no more
    assert (stock.pop("by_itself"), ours.pop("by_itself")) == (True, False)
    assert ours == stock


def test_marlins_experts_have_no_way_behind_it(results: Mapping[str, Any]) -> None:
    """Which the plan says before a start, see experts/launch.py."""
    assert "MARLIN requires a fused func for a2a backend deepep" in results["awq"]["broken"]
