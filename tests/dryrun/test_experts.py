"""Layers of experts on played cards: what SGLang's sources say of each method."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from typing import Any

import pytest

from tests.dryrun.cards import CARDS
from tests.dryrun.experts import RULES, TP_SIZES
from tests.dryrun.matrix import prepare, run_module

pytestmark = pytest.mark.skipif(
    shutil.which("gcc") is None, reason="needs gcc, for the driver's stub"
)
_ALWAYS = "H100"
_TITLES = [
    pytest.param(title, marks=() if title == _ALWAYS else pytest.mark.every_card)
    for title in ("H100", "RTX 2080 Ti", "A100", "RTX 4090", "B200")
]
# class, and scheme where it has one
_GPTQ = "GPTQMarlinMoEMethod/RepairedGPTQMarlinMoEScheme"
_AWQ = "AWQMoEMethod/AWQMoEScheme"
_RUNS_AS = {
    "unquantized": ["UnquantizedFusedMoEMethod"],
    "fp8": ["Fp8MoEMethod"],
    "fp8_block": ["Fp8MoEMethod"],
    "blockwise_int8": ["BlockInt8MoEMethod"],
    "awq": [_AWQ],
    "gptq_int4": [_GPTQ],
    "gptq_int8": [_GPTQ],
    "gptq_column": [_GPTQ],
    # in the order of each group's first expert
    "several": ["UnquantizedFusedMoEMethod", "BlockInt8MoEMethod", _AWQ, _GPTQ],
    "several, with FP8": [_GPTQ, "Fp8MoEMethod", "Fp8MoEMethod"],
}
_TRITON, _MARLIN = "triton:fused_moe_kernel", "jit:moe_wna16_marlin_gemm"
_MATMULS = {
    **{key: {_TRITON} for key in ("unquantized", "fp8", "fp8_block", "blockwise_int8")},
    **{key: {_MARLIN} for key in ("awq", "gptq_int4", "gptq_int8", "gptq_column")},
    **{key: {_TRITON, _MARLIN} for key in ("several", "several, with FP8")},
}
# get_min_capability: blockwise_int8.py:83, gptq/gptq.py:386; AWQ's experts are Marlin's; FP8 in
# Triton's kernel needs e4m3 arithmetic
_LEAST = {
    "unquantized": 75, "fp8": 89, "fp8_block": 89, "several, with FP8": 89,
}  # fmt: skip


@pytest.fixture(scope="module", params=_TITLES)
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Mapping[str, Any]]:
    folder = tmp_path_factory.mktemp("experts")
    prepare(folder)
    return request.param, run_module("experts", request.param, folder)


def _runs(title: str, cell: Mapping[str, Any]) -> bool:
    return CARDS[title].architecture >= _LEAST.get(cell["method"], 80)


def _name(cell: Mapping[str, Any]) -> str:
    return f"{cell['method']}, tp {cell['tp_size']}"


def test_every_cell_runs_or_is_refused_by_the_plan(
    results: tuple[str, Mapping[str, Any]],
) -> None:
    title, found = results
    assert len(found["cells"]) == len(RULES) * len(TP_SIZES)
    for cell in found["cells"]:
        if _runs(title, cell):
            assert not cell["foretold"], _name(cell)
            assert not cell["broken"] + cell["refused"], (_name(cell), cell)
        else:
            assert cell["foretold"], _name(cell)
            assert all(re.search(r"capability|bfloat16", text) for text in cell["foretold"])


def test_class_and_kernels_are_what_sglangs_sources_say(
    results: tuple[str, Mapping[str, Any]],
) -> None:
    title, found = results
    for cell in found["cells"]:
        if not _runs(title, cell):
            continue
        assert cell["runs_as"] == _RUNS_AS[cell["method"]], _name(cell)
        matmuls = {kernel for kernel in cell["kernels"] if kernel in (_TRITON, _MARLIN)}
        assert matmuls == _MATMULS[cell["method"]], _name(cell)
        assert ("ranks:all_reduce" in cell["kernels"]) == (cell["tp_size"] > 1), _name(cell)
        assert not cell["made_up"], _name(cell)


def test_parameters_are_of_the_ranks_sizes(results: tuple[str, Mapping[str, Any]]) -> None:
    title, found = results
    for cell in found["cells"]:
        if cell["method"] != "gptq_int4" or not _runs(title, cell):
            continue
        # 4 experts of 512 inputs and 1024 / tp inner features, groups of 128, 8 codes a word
        inner = 1024 // cell["tp_size"]
        held = cell["parameters"]
        assert held["layer.w13_qweight"] == f"int32 [4, 64, {2 * inner}]"
        assert held["layer.w13_scales"] == f"{cell['dtype']} [4, 4, {2 * inner}]"
        assert held["layer.w2_qweight"] == f"int32 [4, {inner // 8}, 512]"
        assert held["layer.w2_scales"] == f"{cell['dtype']} [4, {inner // 128}, 512]"


def test_triton_kernels_compile_for_the_card(results: tuple[str, Mapping[str, Any]]) -> None:
    _, found = results
    assert found["compiled"].get("fused_moe_kernel", 0) > 0
    assert set(found["compiled"]) == {
        kernel.removeprefix("triton:")
        for cell in found["cells"]
        for kernel in cell["kernels"]
        if kernel.startswith("triton:")
    }
