"""Experts split over two ranks in one process: SGLang's loaders take each rank's part."""

from __future__ import annotations

import pytest
import torch

from tests.cpu.context import one_of_two_ranks
from tests.cpu.expert_layers import (
    HIDDEN,
    dense,
    evaluate,
    load_experts,
    make_case,
    process,
    random_experts,
    relative_error,
    route,
    store,
)
from tests.cpu.layers import Case

CASES = [
    None,
    Case("fp8", {"weight_block_size": None}),
    Case("fp8", {"weight_block_size": [64, 64]}),
    Case("fp8_channel", {}),
    Case("blockwise_int8", {"weight_block_size": [64, 64]}),
    Case("int8_channel", {}),
    Case("awq", {"bits": 4, "group_size": 64}),
    Case("gptq", {"bits": 4, "group_size": 64}),
    Case("gptq", {"bits": 4, "group_size": -1}),
    Case("gptq", {"bits": 8, "group_size": 64}),
    Case("nvfp4", {"keep_input_scale": False}),
    Case("mxfp4", {}),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_add_up_to_the_whole(expert_layer, case):
    stored = [store(case, weights) for weights in random_experts(5)]
    x, topk = torch.randn(6, HIDDEN).bfloat16(), route(6)
    total = torch.zeros(6, HIDDEN)
    for rank in range(2):
        with one_of_two_ranks(rank):
            layer = make_case(expert_layer, case)
        assert layer.intermediate_size_per_partition == 192
        load_experts(layer, stored)
        process(layer)
        total += layer(x, topk).float()
    exact = evaluate(x, topk, [dense(case, projections) for projections in stored])
    is_quantized = case is not None and case.method not in ("awq", "gptq")
    assert relative_error(total, exact) < (0.07 if is_quantized else 0.01)
