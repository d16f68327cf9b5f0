"""Every card, method, layer kind and tensor-parallel size, as SGLang's sources say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.dryrun.cards import CARDS
from tests.dryrun.conftest import ALWAYS, TITLES, Results
from tests.dryrun.expected import SHARED_SCALES, expect
from tests.dryrun.methods import METHODS
from tests.dryrun.tables import SECTIONS, between, cells_of, render, said_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cuda.md"
_BY_TITLE = {method.title: method for method in METHODS}
_TRITON = {
    "_static_quant_fp8",
    "_w8a8_block_fp8_matmul",
    "_w8a8_block_int8_matmul",
    "_per_token_group_quant_int8",
    "_per_token_quant_int8",
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


@pytest.mark.parametrize("title", TITLES)
def test_nothing_breaks(result_of: Results, title: str) -> None:
    broken = {_name(cell): cell["broken"] for cell in result_of(title)["cells"] if cell["broken"]}
    assert not broken, "\n".join(f"{name}: {text}" for name, text in broken.items())


@pytest.mark.parametrize("title", TITLES)
def test_class_and_kernels_are_what_sglangs_sources_say(result_of: Results, title: str) -> None:
    card = CARDS[title]
    assert len(result_of(title)["cells"]) == len(METHODS) * (9 * 3 + 1)
    wrong = []
    for cell in result_of(title)["cells"]:
        place = _BY_TITLE[cell["method"]], cell["kind"], cell["tp_size"], cell["dtype"]
        expected = expect(card, *place)
        got = (cell["runs_as"], tuple(cell["kernels"]))
        if got != (expected.runs_as, expected.kernels):
            wrong.append(f"{_name(cell)}: {got} {cell['refused']} (expected {expected})")
        elif (expected.refused or "nothing") not in (cell["refused"] or "nothing"):
            wrong.append(f"{_name(cell)}: {cell['refused']} (expected {expected.refused})")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("title", TITLES)
def test_rules_refuse_exactly_the_cells_that_do_not_run(result_of: Results, title: str) -> None:
    wrong = {
        _name(cell): (cell["foretold"], cell["refused"])
        for cell in result_of(title)["cells"]
        if bool(cell["foretold"]) != bool(cell["refused"] or cell["broken"])
    }
    assert not wrong


@pytest.mark.parametrize("title", TITLES)
def test_whole_llama_runs_a_method_in_each_layer(result_of: Results, title: str) -> None:
    card = CARDS[title]
    llamas = [model for model in result_of(title)["models"] if model["name"] == "Llama"]
    assert len(llamas) == 3
    for model in llamas:
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


@pytest.mark.parametrize("title", TITLES)
def test_no_result_depends_on_made_up_data(result_of: Results, title: str) -> None:
    made_up = {
        cell["method"]: cell["made_up"] for cell in result_of(title)["cells"] if cell["made_up"]
    }
    if CARDS[title].architecture == 120:
        # layers/quantization/utils.py, `requantize_with_max_scale`: whether the scale of the last
        # shard was loaded, which `check_filled` proves; and one scale, as a number
        assert {made_up.pop(name)[0] for name in ("fp8", "fp8_static")} == {"_local_scalar_dense"}
    assert set(made_up.pop("nvfp4", ())) <= SHARED_SCALES
    assert not made_up


@pytest.mark.parametrize("title", TITLES)
def test_triton_kernels_compile_for_the_card(result_of: Results, title: str) -> None:
    result = result_of(title)
    launched = {
        kernel.removeprefix("triton:")
        for part in ("cells", "experts", "models")
        for cell in result[part]
        for kernel in cell["kernels"]
        if kernel.startswith("triton:")
    }
    assert launched == {name for name, count in result["compiled"].items() if count}
    in_linear = {
        kernel.removeprefix("triton:")
        for cell in result["cells"]
        for kernel in cell["kernels"]
        if kernel.startswith("triton:")
    }
    assert in_linear <= _TRITON
    assert bool(in_linear) == (CARDS[title].capability >= (8, 0))


@pytest.mark.parametrize("title", TITLES)
def test_new_weights_are_taken_where_sglang_left_the_weights_alone(
    result_of: Results, title: str
) -> None:
    """`load_again` has proven what is taken; the rest is refused before a weight is written."""
    for cell in result_of(title)["cells"]:
        if not cell["runs_as"]:
            continue
        is_plain = cell["method"] == "unquantized"
        # in Marlin, and in DeepGEMM's form of 10.0, scales are others than those stored
        is_block = cell["method"] == "fp8_block" and not (
            {"jit:gptq_marlin_gemm"} & set(cell["kernels"])
            or (
                CARDS[title].architecture == 100
                and {"deep_gemm:fp8_fp4_gemm_nt"} & set(cell["kernels"])
            )
        )
        assert cell["again"] == ("taken" if is_plain or is_block else "refused"), _name(cell)


@pytest.mark.parametrize("title", TITLES)
@pytest.mark.parametrize("section", SECTIONS)
def test_page_says_what_becomes_of_each_cell(result_of: Results, title: str, section: str) -> None:
    said = cells_of(PAGE.read_text(encoding="utf-8"), section, title)
    assert said == said_of(result_of(title), section, title), "run make dryrun"


@pytest.mark.every_card
@pytest.mark.parametrize("section", [*SECTIONS, "models"])
def test_page_holds_the_tables(result_of: Results, section: str) -> None:
    results = {title: result_of(title) for title in CARDS}
    page = PAGE.read_text(encoding="utf-8")
    assert between(page, section) == render(results, section), "run make dryrun"


def test_page_has_a_column_for_each_card() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for section in SECTIONS:
        assert all(cells_of(page, section, title) for title in CARDS)
    assert ALWAYS[0] in between(page, "models")


def _name(cell: Mapping[str, Any]) -> str:
    return f"{cell['method']} in {cell['kind']}, tp {cell['tp_size']}, {cell['dtype']}"
