"""Every card, method, layer kind and tensor-parallel size, as SGLang's sources say."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.dryrun.cards import CARDS
from tests.dryrun.expected import expect
from tests.dryrun.matrix import Result, render, run_cards
from tests.dryrun.methods import METHODS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc, for the driver's stub"),
]
_BY_TITLE = {method.title: method for method in METHODS}
_TRITON = {
    "_static_quant_fp8",
    "_w8a8_block_fp8_matmul",
    "_w8a8_block_int8_matmul",
    "_per_token_group_quant_int8",
}

# what a Llama launches beside its linear layers
_BESIDE_LINEAR = {
    "triton:_vocab_parallel_embedding_kernel",
    "ranks:all_reduce",
    "flashinfer:rmsnorm",
    "flashinfer:fused_add_rmsnorm",
    "jit:run_rope",
    "attention:radix",
    "jit:run_activation",
    # the MLP of a B200, unquantized or in FP8: gate, up and SiLU in one kernel
    "sglang:cutedsl_dual_gemm_swiglu",
    "sglang:cutedsl_dual_gemm_swiglu_fp8",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Result]:
    return run_cards(tmp_path_factory.mktemp("dryrun"))


@pytest.mark.parametrize("title", CARDS)
def test_nothing_breaks(results: Mapping[str, Result], title: str) -> None:
    broken = {_name(cell): cell["broken"] for cell in results[title]["cells"] if cell["broken"]}
    assert not broken, "\n".join(f"{name}: {text}" for name, text in broken.items())


@pytest.mark.parametrize("title", CARDS)
def test_class_and_kernels_are_what_sglangs_sources_say(
    results: Mapping[str, Result], title: str
) -> None:
    card = CARDS[title]
    assert len(results[title]["cells"]) == len(METHODS) * (9 * 3 + 1)
    wrong = []
    for cell in results[title]["cells"]:
        place = _BY_TITLE[cell["method"]], cell["kind"], cell["tp_size"], cell["dtype"]
        expected = expect(card, *place)
        got = (cell["runs_as"], tuple(cell["kernels"]))
        if got != (expected.runs_as, expected.kernels):
            wrong.append(f"{_name(cell)}: {got} {cell['refused']} (expected {expected})")
        elif (expected.refused or "nothing") not in (cell["refused"] or "nothing"):
            wrong.append(f"{_name(cell)}: {cell['refused']} (expected {expected.refused})")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("title", CARDS)
def test_rules_refuse_exactly_the_cells_that_do_not_run(
    results: Mapping[str, Result], title: str
) -> None:
    wrong = {
        _name(cell): (cell["foretold"], cell["refused"])
        for cell in results[title]["cells"]
        if bool(cell["foretold"]) != bool(cell["refused"] or cell["broken"])
    }
    assert not wrong


@pytest.mark.parametrize("title", CARDS)
def test_whole_llama_runs_a_method_in_each_layer(results: Mapping[str, Result], title: str) -> None:
    card = CARDS[title]
    for model in results[title]["models"]:
        assert not model["broken"] + model["refused"], model["broken"] + model["refused"]
        expected = {
            method.title: expect(card, method, "column", model["tp_size"], card.dtype)
            for method in METHODS
            if method.stored == "bf16"
        }
        runs = {name: cell for name, cell in expected.items() if not cell.refused}
        assert model["runs_as"] == {name: [cell.runs_as] * 4 for name, cell in runs.items()}
        kernels = {kernel for cell in runs.values() for kernel in cell.kernels}
        assert set(model["kernels"]) - _BESIDE_LINEAR == kernels


@pytest.mark.parametrize("title", CARDS)
def test_no_result_depends_on_made_up_data(results: Mapping[str, Result], title: str) -> None:
    made_up = {
        cell["method"]: cell["made_up"] for cell in results[title]["cells"] if cell["made_up"]
    }
    if CARDS[title].architecture == 120:
        # layers/quantization/utils.py, `requantize_with_max_scale`: whether the scale of the last
        # shard was loaded, which `check_filled` proves; and one scale, as a number
        assert {made_up.pop(name)[0] for name in ("fp8", "fp8_static")} == {"_local_scalar_dense"}
    assert not made_up


@pytest.mark.parametrize("title", CARDS)
def test_triton_kernels_compile_for_the_card(results: Mapping[str, Result], title: str) -> None:
    launched = {
        kernel.removeprefix("triton:")
        for cell in results[title]["cells"]
        for kernel in cell["kernels"]
        if kernel.startswith("triton:")
    }
    compiled = {name for name, count in results[title]["compiled"].items() if count}
    assert launched == compiled
    assert compiled <= _TRITON
    assert bool(compiled) == (CARDS[title].capability >= (8, 0))


def test_page_holds_the_matrix(results: Mapping[str, Result]) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "cuda.md"
    assert render(results) in page.read_text(encoding="utf-8"), "run make dryrun"


def _name(cell: Mapping[str, Any]) -> str:
    return f"{cell['method']} in {cell['kind']}, tp {cell['tp_size']}, {cell['dtype']}"
