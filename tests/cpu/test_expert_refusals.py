"""What the CPU platform does not run of experts, said when the layer is built."""

from __future__ import annotations

import re

import pytest

from mixedprec_plugin.errors import MethodError, ShapeError
from tests.cpu.expert_layers import make_case
from tests.cpu.layers import Case

FP8 = Case("fp8", {"weight_block_size": [128, 128]})
INT8 = Case("blockwise_int8", {"weight_block_size": [128, 128]})
AWQ = Case("awq", {"bits": 4, "group_size": 128})
GPTQ = Case("gptq", {"bits": 4, "group_size": 128})
ALL = [None, FP8, INT8, AWQ, GPTQ]


def _name(case: Case | None) -> str:
    return "bf16" if case is None else case.method


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"activation": "relu2"}, "the activation 'relu2' (expected silu"),
        ({"is_gated": False}, "experts without a gate"),
        ({"gemm1_alpha": 1.7}, "a clamped or scaled gate"),
        ({"gemm1_clamp_limit": 7.0}, "a clamped or scaled gate"),
        ({"swiglu_limit": 10.0}, "a clamped or scaled gate"),
        ({"num_fused_shared_experts": 1}, "shared experts fused into the routed ones"),
    ],
)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_other_forms_of_experts_are_refused(expert_layer, case, options, text):
    where = f"experts: the CPU platform does not run experts in {_name(case)} with "
    with pytest.raises(MethodError, match=re.escape(where + text)):
        make_case(expert_layer, case, **options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"with_bias": True}, "biases"),
        ({"gemm1_alpha": 1.7, "gemm1_clamp_limit": 7.0}, "a clamped or scaled gate"),
    ],
)
@pytest.mark.parametrize("case", ALL[1:], ids=str)
def test_experts_of_gpt_oss_are_refused_in_other_methods(expert_layer, case, options, text):
    with pytest.raises(MethodError, match=f"experts in {_name(case)} with {text}"):
        make_case(expert_layer, case, **options)


@pytest.mark.parametrize("case", [AWQ, GPTQ], ids=str)
def test_marlins_experts_run_silu_alone(expert_layer, case):
    with pytest.raises(MethodError, match=r"the activation 'gelu' \(expected silu\)"):
        make_case(expert_layer, case, activation="gelu")


@pytest.mark.parametrize("case", ALL[1:], ids=str)
def test_sizes_that_no_group_divides_are_refused(expert_layer, case):
    unit = "block size" if "block" in str(case.arguments) else "group size"
    text = rf"experts: intermediate size a rank 320 in {case.method} \(expected a multiple of 128"
    with pytest.raises(ShapeError, match=rf"{text}, the {unit}\)"):
        make_case(expert_layer, case, intermediate_size=320)
    with pytest.raises(ShapeError, match=rf"hidden size 192 in {case.method}"):
        make_case(expert_layer, case, hidden_size=192)
