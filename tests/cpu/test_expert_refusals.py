"""What the CPU platform does not run of experts, said when the layer is built."""

from __future__ import annotations

import re

import pytest
import torch

from mixedprec_plugin.errors import MethodError, ShapeError
from tests.cpu.context import one_of_two_ranks
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
        ({"with_bias": True}, "biases"),
        ({"gemm1_alpha": 1.7, "gemm1_clamp_limit": 7.0}, "a clamped or scaled gate"),
        ({"swiglu_limit": 10.0}, "a clamped or scaled gate"),
        ({"num_fused_shared_experts": 1}, "shared experts fused into the routed ones"),
    ],
)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_other_forms_of_experts_are_refused(expert_layer, case, options, text):
    where = f"experts: the CPU platform does not run experts in {_name(case)} with "
    with pytest.raises(MethodError, match=re.escape(where + text)):
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


def test_awq_experts_with_one_group_a_column_are_refused(expert_layer):
    with pytest.raises(ShapeError, match=r"hidden size 256 in awq \(expected a multiple of -1"):
        make_case(expert_layer, Case("awq", {"bits": 4, "group_size": -1}))


def test_gptq_experts_do_not_take_the_router_weight_on_the_input(expert_layer):
    text = "SGLang's GPTQ experts do not compute the router weight on the input"
    with pytest.raises(MethodError, match=text):
        make_case(expert_layer, GPTQ, apply_router_weight_on_input=True)


def test_act_order_over_ranks_is_refused(expert_layer):
    case = Case("gptq", {"bits": 4, "group_size": 128, "desc_act": True})
    with (
        one_of_two_ranks(0),
        pytest.raises(MethodError, match=r"do not compute act order \(desc_act\) over 2 ranks"),
    ):
        make_case(expert_layer, case, intermediate_size=512)


def test_fp4_experts_are_refused(expert_layer):
    from mixedprec_plugin.methods.fp8.sglang import CpuFp8Config

    config = CpuFp8Config(is_checkpoint_fp8_serialized=True, is_fp4_experts=True)
    layer = make_case(expert_layer, None)
    with pytest.raises(MethodError, match="the CPU platform does not run fp8 with FP4 experts"):
        config.get_quant_method(layer, "experts")


def test_ignored_experts_stay_unquantized(expert_layer):
    from mixedprec_plugin.methods.awq.sglang import CpuAWQConfig

    layer = make_case(expert_layer, None)
    assert CpuAWQConfig(4, 128, True, ["experts"]).get_quant_method(layer, "experts") is None


def test_gptq_scales_have_the_models_dtype(expert_layer):
    for dtype in (torch.bfloat16, torch.float16):
        layer = make_case(expert_layer, GPTQ, params_dtype=dtype)
        assert layer.w13_scales.dtype == layer.w2_scales.dtype == dtype
