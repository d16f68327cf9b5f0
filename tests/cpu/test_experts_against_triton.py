"""The experts against SGLang's own fused MoE kernels, run by Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cpu.context import interpret
from tests.cpu.expert_layers import load_experts, make_case, process, stored_experts
from tests.cpu.triton_experts import CASES


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Inputs and outputs of the kernels, computed in a process of their own."""
    return interpret("tests.cpu.triton_experts", tmp_path_factory.mktemp("triton"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_experts_are_the_kernels(expert_layer, calls, case):
    """Masked ids, ragged tiles, the router weight on either product.

    An intermediate that float32 sums in another order may round otherwise to bfloat16, and then to
    another code: few outputs differ, by little.
    """
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    assert len(calls[str(case)]) == 4
    for x, weights, ids, on_input, expected in calls[str(case)]:
        layer = make_case(expert_layer, case, apply_router_weight_on_input=on_input)
        load_experts(layer, stored_experts(case))
        process(layer)
        layer.moe_runner_config.no_combine = True
        layer.moe_runner_config.no_combine_keep_router_weight = True
        out = layer(x, StandardTopKOutput(weights, ids, torch.zeros(len(ids), 5)))
        assert not out[ids < 0].any()
        assert not expected[ids < 0].any()
        difference = (out.double() - expected.double()).abs()
        size = expected.double().square().mean(2, keepdim=True).sqrt()
        if case is None:
            # a lone row is rounded before the router weight multiplies it, too
            assert (difference <= 2**-5 * size).all()
        else:
            assert (difference <= 2**-4 * size).all()
            assert (difference > 0).double().mean() <= 0.01
