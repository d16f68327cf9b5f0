"""gpt-oss's own experts beside attention by rules, on cards that are played."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest

from tests.dryrun.gpt_oss import MIXES, TP_SIZES
from tests.dryrun.matrix import prepare, run_module

# mix -> classes of its experts, and the kernels that multiply and run the gate
EXPERTS: Mapping[str, tuple[list[str], set[str]]] = {
    "mxfp4": (["Mxfp4MoEMethod"], {"jit:moe_wna16_marlin_gemm", "triton:_swiglu_oai_kernel"}),
    # Triton's runner leaves the gate to torch's compiler
    "bf16": (["UnquantizedFusedMoEMethod"], {"triton:fused_moe_kernel"}),
}
MIXED = [EXPERTS[method] for method in ("bf16", "mxfp4")]
RUNS = {
    **EXPERTS,
    "auto": EXPERTS["mxfp4"],
    "several": ([name for names, _ in MIXED for name in names], MIXED[0][1] | MIXED[1][1]),
}
_OF_EXPERTS = re.compile("jit:moe_wna16_marlin_gemm|triton:(?:_swiglu_oai|fused_moe)_kernel")
_ATTENTION = {"jit:awq_dequantize", "jit:gptq_marlin_gemm", "sgl_kernel:fp8_scaled_mm"}


@pytest.fixture(scope="module", params=["H100", "B200"])
def models(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("gpt_oss")
    prepare(folder)
    found: Any = run_module("gpt_oss", request.param, folder)
    return list(found)


def test_experts_run_in_sglangs_classes_and_kernels_and_attention_by_its_rules(
    models: list[dict[str, Any]],
) -> None:
    assert [(m["mix"], m["tp_size"]) for m in models] == [(m, n) for m in MIXES for n in TP_SIZES]
    for model in models:
        assert not model["broken"] + model["refused"], model["broken"] + model["refused"]
        classes, kernels = RUNS[model["mix"]]
        for layer, attention in enumerate(("AWQLinearMethod", "Fp8LinearMethod")):
            block = f"model.layers.{layer}"
            assert model["runs_as"][f"{block}.mlp.experts"] == classes
            for module in ("qkv_proj", "o_proj"):
                (runs_as,) = model["runs_as"][f"{block}.self_attn.{module}"]
                assert runs_as.partition("/")[0] == attention
        assert {kernel for kernel in model["kernels"] if _OF_EXPERTS.fullmatch(kernel)} == kernels
        assert set(model["kernels"]) >= _ATTENTION
        assert model["made_up"] == []


def test_cards_before_hopper_are_refused_by_the_plan(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("gpt_oss")
    prepare(folder)
    found: Any = run_module("gpt_oss", "A100", folder)
    for model in found:
        assert not model["broken"], model["broken"]
        if model["mix"] == "bf16":
            assert model["runs_as"]
        else:
            assert "compute capability is 8.0 (expected 9.0 or more)" in model["refused"]
