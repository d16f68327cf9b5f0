"""Whole models with experts, through the plugin's loader, on played cards."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest

from tests.dryrun.cards import CARDS, Card
from tests.dryrun.conftest import TITLES, Results
from tests.dryrun.expected import expect
from tests.dryrun.families import (
    FAMILIES,
    MIXES,
    TRITON_ROUTING,
    hardest,
    modules,
    needs,
)
from tests.dryrun.methods import METHODS, TP_SIZES
from tests.dryrun.test_experts import MATMULS, RUNS_AS

pytestmark = [
    pytest.mark.parametrize("title", TITLES),
    pytest.mark.parametrize("family", FAMILIES),
]
_METHODS = {method.title: method for method in METHODS}
# multiplications by weights; what else a model launches is not asked for
_MATMULS = re.compile(
    r"aten:(?:mm|_scaled_mm)|jit:(?:gptq_marlin_gemm|awq_dequantize|moe_wna16_marlin_gemm)"
    r"|sgl_kernel:fp8_scaled_mm|deep_gemm:.*|triton:(?:_w8a8_.*|fused_moe_kernel)"
)


def _models(result_of: Results, title: str, family: str) -> list[Mapping[str, Any]]:
    return [model for model in result_of(title)["models"] if model["name"] == family]


def test_mix_that_the_card_cannot_run_is_refused_by_the_plan(
    result_of: Results, title: str, family: str
) -> None:
    card = CARDS[title]
    refused = [
        model
        for model in _models(result_of, title, family)
        if card.architecture < needs(model["mix"])
    ]
    beyond = [mix for mix in MIXES if card.architecture < needs(mix)]
    assert len(refused) == len(beyond) * len(TP_SIZES)
    for model in refused:
        assert not model["broken"], model["broken"]
        for line in model["refused"].splitlines():
            assert re.search("compute capability", line), line


def test_model_runs_in_sglangs_classes_and_kernels(
    result_of: Results, title: str, family: str
) -> None:
    card = CARDS[title]
    found = _runs(result_of, title, family)
    assert sorted(model["tp_size"] for model in found) == list(TP_SIZES)
    for model in found:
        assert not model["broken"] + model["refused"], model["broken"] + model["refused"]
        classes, kernels = _expected(card, family, model["mix"], model["tp_size"])
        assert model["runs_as"] == classes
        launched = {kernel for kernel in model["kernels"] if _MATMULS.fullmatch(kernel)}
        # routers and kv_b_proj's halves are multiplied by torch
        assert launched - {"aten:mm"} == kernels - {"aten:mm"}
        assert ("ranks:all_reduce" in model["kernels"]) == (model["tp_size"] > 1)


def test_no_result_depends_on_made_up_data(result_of: Results, title: str, family: str) -> None:
    made_up = [model["made_up"] for model in _runs(result_of, title, family)]
    if CARDS[title].architecture == 120:
        # as in each layer: tests/dryrun/test_matrix.py
        return
    assert made_up == [[], [], []]


def test_routing_that_the_card_lacks_is_refused_with_the_setting_that_helps(
    result_of: Results, title: str, family: str
) -> None:
    lacks = family == "DeepSeek-V3" and CARDS[title].architecture < 89
    refused = [
        model["refused"]
        for model in _models(result_of, title, family)
        if "FlashInfer" in model["refused"]
        and not model["setting"]
        and model["mix"] == hardest(CARDS[title])
    ]
    assert len(refused) == (len(TP_SIZES) if lacks else 0)
    for text in refused:
        assert text.endswith(f"set {TRITON_ROUTING}=1 in the environment of the server")


def _runs(result_of: Results, title: str, family: str) -> list[Mapping[str, Any]]:
    """The runs of the mix with the most that the card can, with the setting where it needs one."""
    card = CARDS[title]
    setting = TRITON_ROUTING if family == "DeepSeek-V3" and card.architecture < 89 else ""
    return [
        model
        for model in _models(result_of, title, family)
        if (model["mix"], model["setting"]) == (hardest(card), setting)
    ]


def _expected(
    card: Card, family: str, mix: str, tp_size: int
) -> tuple[dict[str, list[str]], set[str]]:
    """Module -> classes, and the multiplications, of each method alone."""
    classes: dict[str, list[str]] = {}
    kernels: set[str] = set()
    for layer, given in enumerate(MIXES[mix]):
        for module, methods in modules(FAMILIES[family], layer, given).items():
            path = f"model.layers.{layer}.{module}"
            if module == FAMILIES[family].experts:
                classes[path] = [RUNS_AS[method][0] for method in methods]
                kernels |= {kernel for method in methods for kernel in MATMULS[method]}
                continue
            cell = expect(card, _METHODS[methods[0]], "column", tp_size, card.dtype)
            classes[path] = [cell.runs_as]
            # kv_b_proj is absorbed, and not run in a step of decoding
            if not module.endswith("kv_b_proj"):
                kernels |= {kernel for kernel in cell.kernels if _MATMULS.fullmatch(kernel)}
    return classes, kernels
