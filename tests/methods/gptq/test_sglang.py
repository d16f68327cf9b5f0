"""Experts in GPTQ: what is cured, and what Marlin would compute wrongly."""

from __future__ import annotations

import pytest
import torch

from mixedprec_plugin.errors import MethodError
from mixedprec_plugin.methods.registry import METHODS
from tests.cpu.context import one_of_two_ranks
from tests.cpu.expert_layers import make_case
from tests.cpu.layers import Case, make_config

GPTQ = Case("gptq", {"bits": 4, "group_size": 128})


def test_gptq_config_of_cuda_is_repaired(expert_layer):
    from sglang.srt.layers.quantization.gptq import GPTQMarlinConfig

    from mixedprec_plugin.methods.construct import repaired
    from mixedprec_plugin.methods.gptq.sglang import GPTQExpertsConfig

    config = repaired(GPTQMarlinConfig(4, 64, False, True, False, {}, {"bits": 4}), METHODS)
    assert type(config) is GPTQExpertsConfig
    assert vars(config) == vars(GPTQMarlinConfig(4, 64, False, True, False, {}, {"bits": 4}))
    own = make_config(GPTQ)
    assert repaired(own, METHODS) is own


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


def test_gptq_scales_have_the_models_dtype(expert_layer):
    for dtype in (torch.bfloat16, torch.float16):
        layer = make_case(expert_layer, GPTQ, params_dtype=dtype)
        assert layer.w13_scales.dtype == layer.w2_scales.dtype == dtype
