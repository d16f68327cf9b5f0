"""Layers of experts on played cards: what SGLang's sources say of each method."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest

from tests.dryrun.cards import CARDS
from tests.dryrun.conftest import TITLES, Results
from tests.dryrun.expected import SHARED_SCALES
from tests.dryrun.experts import KINDS, RULES
from tests.dryrun.methods import TP_SIZES

pytestmark = pytest.mark.parametrize("title", TITLES)
# class, and scheme where it has one
_GPTQ = "GPTQMarlinMoEMethod/RepairedGPTQMarlinMoEScheme"
_AWQ = "AWQMoEMethod/RepairedAWQMoEScheme"
RUNS_AS = {
    "unquantized": ["UnquantizedFusedMoEMethod"],
    "fp8": ["Fp8MoEMethod"],
    "fp8_block": ["Fp8MoEMethod"],
    "fp8_channel": ["W8A8FP8MoEMethod"],
    "blockwise_int8": ["BlockInt8MoEMethod"],
    "int8_channel": ["W8A8Int8MoEMethod"],
    "awq": [_AWQ],
    "gptq_int4": [_GPTQ],
    "gptq_int8": [_GPTQ],
    "gptq_column": [_GPTQ],
    "nvfp4": ["ModelOptNvFp4FusedMoEMethod"],
    "mxfp4": ["Mxfp4MoEMethod"],
    # in the order of each group's first expert
    "several": ["UnquantizedFusedMoEMethod", "BlockInt8MoEMethod", _AWQ, _GPTQ],
    "several, in FP4": ["ModelOptNvFp4FusedMoEMethod", "Mxfp4MoEMethod"],
    "several, with FP8": [_GPTQ, "Fp8MoEMethod", "Fp8MoEMethod", "W8A8FP8MoEMethod"],
}
_TRITON, _MARLIN = "triton:fused_moe_kernel", "jit:moe_wna16_marlin_gemm"
MATMULS = {
    **{
        key: {_TRITON}
        for key in (
            "unquantized",
            "fp8",
            "fp8_block",
            "fp8_channel",
            "blockwise_int8",
            "int8_channel",
        )
    },
    **{key: {_MARLIN} for key in ("awq", "gptq_int4", "gptq_int8", "gptq_column", "nvfp4")},
    **{key: {_MARLIN} for key in ("mxfp4", "several, in FP4")},
    **{key: {_TRITON, _MARLIN} for key in ("several", "several, with FP8")},
}
# get_min_capability: blockwise_int8.py:83, gptq/gptq.py:386; AWQ's experts are Marlin's; FP8 in
# Triton's kernel needs e4m3 arithmetic
_LEAST = {
    "unquantized": 75, "fp8": 89, "fp8_block": 89, "fp8_channel": 89, "several, with FP8": 89,
    # mxfp4.py:655
    "mxfp4": 90, "several, in FP4": 90,
}  # fmt: skip


# whose shards' scales are asked whether they are one
_SHARING = {"nvfp4", "several, in FP4"}
# at tensor parallel 8 a rank has 64 inner features of 512: half a block of 128 (fp8.py:1588,
# blockwise_int8.py:284), and half a group of 128, which Marlin does not take (marlin_utils.py:227)
_TOO_NARROW = {
    "fp8_block", "blockwise_int8", "awq", "gptq_int4", "gptq_int8", "several", "several, with FP8",
}  # fmt: skip


def _runs(title: str, cell: Mapping[str, Any]) -> bool:
    return _is_capable(title, cell) and not _is_too_narrow(cell)


def _is_capable(title: str, cell: Mapping[str, Any]) -> bool:
    return CARDS[title].architecture >= _LEAST.get(cell["method"], 80)


def _is_too_narrow(cell: Mapping[str, Any]) -> bool:
    place = cell["kind"], cell["tp_size"]
    return place == ("narrow_experts", 8) and cell["method"] in _TOO_NARROW


def _name(cell: Mapping[str, Any]) -> str:
    return f"{cell['method']} in {cell['kind']}, tp {cell['tp_size']}"


def test_every_cell_runs_or_is_refused_by_the_plan(result_of: Results, title: str) -> None:
    found = result_of(title)["experts"]
    assert len(found) == len(RULES) * len(KINDS) * len(TP_SIZES)
    for cell in found:
        if _runs(title, cell):
            assert not cell["foretold"], _name(cell)
            assert not cell["broken"] + cell["refused"], (_name(cell), cell)
        else:
            assert cell["foretold"], _name(cell)
            words = (
                "" if _is_capable(title, cell) else "capability|bfloat16",
                "is not a multiple of|not divide" if _is_too_narrow(cell) else "",
            )
            reason = "|".join(filter(None, words))
            assert all(re.search(reason, text) for text in cell["foretold"]), cell["foretold"]


def test_class_and_kernels_are_what_sglangs_sources_say(result_of: Results, title: str) -> None:
    for cell in result_of(title)["experts"]:
        if not _runs(title, cell):
            continue
        assert cell["runs_as"] == RUNS_AS[cell["method"]], _name(cell)
        matmuls = {kernel for kernel in cell["kernels"] if kernel in (_TRITON, _MARLIN)}
        assert matmuls == MATMULS[cell["method"]], _name(cell)
        assert ("ranks:all_reduce" in cell["kernels"]) == (cell["tp_size"] > 1), _name(cell)
        assert set(cell["made_up"]) <= (SHARED_SCALES if cell["method"] in _SHARING else set()), (
            _name(cell)
        )


def test_parameters_are_of_the_ranks_sizes(result_of: Results, title: str) -> None:
    for cell in result_of(title)["experts"]:
        if cell["method"] != "gptq_int4" or not _runs(title, cell):
            continue
        # 4 experts of 512 inputs, groups of 128, 8 codes a word
        inner = KINDS[cell["kind"]] // cell["tp_size"]
        held = cell["parameters"]
        assert held["layer.w13_qweight"] == f"int32 [4, 64, {2 * inner}]"
        assert held["layer.w13_scales"] == f"{cell['dtype']} [4, 4, {2 * inner}]"
        assert held["layer.w2_qweight"] == f"int32 [4, {inner // 8}, 512]"
        assert held["layer.w2_scales"] == f"{cell['dtype']} [4, {inner // 128}, 512]"


def test_new_weights_are_taken_where_sglang_left_the_weights_alone(
    result_of: Results, title: str
) -> None:
    """`load_again` has proven what is taken; the rest is refused before a weight is written."""
    for cell in result_of(title)["experts"]:
        if _runs(title, cell):
            is_taken = cell["method"] in ("unquantized", "fp8_block", "blockwise_int8")
            assert cell["again"] == ("taken" if is_taken else "refused"), _name(cell)
