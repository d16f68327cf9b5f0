"""Layers whose experts run in several schemes, on the CPU platform."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from mixedprec_plugin.errors import LoadError
from tests.cpu.context import one_of_two_owners, one_of_two_ranks
from tests.cpu.expert_layers import (
    HIDDEN,
    INTERMEDIATE,
    dense,
    evaluate,
    make_case,
    make_experts,
    process,
    random_experts,
    relative_error,
    route,
    store,
)
from tests.cpu.layers import Case, make_config

FP8 = Case("fp8", {"weight_block_size": [64, 64]})
FP8_TENSOR = Case("fp8", {"weight_block_size": None})
FP8_CHANNEL = Case("fp8_channel", {})
INT8 = Case("blockwise_int8", {"weight_block_size": [64, 64]})
AWQ = Case("awq", {"bits": 4, "group_size": 64})
GPTQ = Case("gptq", {"bits": 4, "group_size": 64})
GPTQ8 = Case("gptq", {"bits": 8, "group_size": 64})
NUM_EXPERTS = 8
# expert -> its method; groups are neither runs nor in order
MIXED: list[Case | None] = [FP8, AWQ, FP8_CHANNEL, GPTQ, INT8, AWQ, GPTQ8, None]
WEIGHT_ONLY: list[Case | None] = [GPTQ, AWQ, None, GPTQ, None, AWQ, GPTQ8, None]


def make_groups(cases: list[Case | None]) -> list[Any]:
    """One group for each method, in the order in which they first come."""
    groups = []
    for case in dict.fromkeys(map(str, cases)):
        ids = tuple(expert for expert, own in enumerate(cases) if str(own) == case)
        own = cases[ids[0]]
        groups.append(make_group(ids, own, None if own is None else make_config(own)))
    return groups


def make_group(ids: tuple[int, ...], case: Case | None = None, config: Any = None) -> Any:
    """Some experts in one method."""
    from mixedprec_plugin.experts.groups import ExpertGroup

    name = "bf16" if case is None else case.method
    return ExpertGroup(ids, name, name, config)


class MixedConfig:
    """A config that gives experts what `experts_method` chooses, as the composite one does."""

    def __init__(self, groups: list[Any]) -> None:
        self.groups = groups

    def get_name(self) -> str:
        return "mixedprec"

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        from mixedprec_plugin.experts.composite import experts_method

        return experts_method(layer, prefix, self.groups)


def make_layer(layer_class: type, cases: list[Case | None], **options: Any) -> Any:
    """A layer whose experts run in these methods."""
    config = MixedConfig(make_groups(cases))
    return make_experts(layer_class, config, **{"num_experts": len(cases), **options})


def stored(cases: list[Case | None], seed: int = 0) -> list[Any]:
    """Random experts, each as its method stores it."""
    weights = random_experts(len(cases), seed)
    return [store(case, own) for case, own in zip(cases, weights, strict=True)]


def loaded(layer_class: type, cases: list[Case | None], **options: Any) -> Any:
    """A layer with its weights."""
    layer = make_layer(layer_class, cases, **options)
    place(layer, stored(cases))
    process(layer)
    return layer


def place(layer: Any, experts: list[Any]) -> None:
    """Hand every tensor of every expert to the layer."""
    from mixedprec_plugin.experts.loading import load_expert_tensor

    for expert, projections in enumerate(experts):
        for shard, tensors in projections.items():
            for suffix, tensor in tensors.items():
                load_expert_tensor(layer, expert, shard, suffix, tensor)


def inputs(num_tokens: int) -> torch.Tensor:
    return torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(7)).bfloat16()


def exact(cases: list[Case | None], x: torch.Tensor, topk: Any, **options: Any) -> np.ndarray:
    experts = [dense(case, own) for case, own in zip(cases, stored(cases), strict=True)]
    return evaluate(x, topk, experts, **options)


@pytest.mark.parametrize("num_tokens", [1, 7, 70])
@pytest.mark.parametrize(("cases", "limit"), [(WEIGHT_ONLY, 0.009), (MIXED, 0.07)])
def test_output_is_near_the_dense_evaluation(expert_layer, cases, limit, num_tokens):
    x, topk = inputs(num_tokens), route(num_tokens, num_experts=NUM_EXPERTS)
    out = loaded(expert_layer, cases)(x, topk)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, exact(cases, x, topk)) < limit


@pytest.mark.parametrize("case", [None, FP8, FP8_CHANNEL, INT8, AWQ, GPTQ, GPTQ8], ids=str)
def test_groups_of_one_method_give_what_one_layer_gives(expert_layer, case):
    config = None if case is None else make_config(case)
    groups = [make_group(ids, case, config) for ids in ((0, 3, 6), (1, 7), (2, 4, 5))]
    split = make_experts(expert_layer, MixedConfig(groups), num_experts=NUM_EXPERTS)
    whole = make_case(expert_layer, case, num_experts=NUM_EXPERTS)
    for layer in (split, whole):
        place(layer, stored([case] * NUM_EXPERTS))
        process(layer)
    x, topk = inputs(33), route(33, num_experts=NUM_EXPERTS)
    ours, theirs = split(x, topk), whole(x, topk)
    # float32 sums come in another order: few outputs round otherwise
    assert (ours != theirs).double().mean() < 0.005
    assert torch.allclose(ours.float(), theirs.float(), rtol=2**-7, atol=1e-6)


def test_masked_tokens_give_zeros(expert_layer):
    ids = torch.tensor([[0, -1, 5], [-1, -1, -1], [7, 2, 4]], dtype=torch.int32)
    x, topk = inputs(3), route(3, ids, num_experts=NUM_EXPERTS)
    out = loaded(expert_layer, MIXED)(x, topk)
    assert not out[1].any()
    assert relative_error(out, exact(MIXED, x, topk)) < 0.07


def test_input_stays_as_it_is(expert_layer):
    layer, x = loaded(expert_layer, MIXED), inputs(5)
    before = x.clone()
    layer(x, route(5, num_experts=NUM_EXPERTS))
    assert torch.equal(x, before)


def test_no_tokens_give_no_rows(expert_layer):
    out = loaded(expert_layer, MIXED)(inputs(0), route(0, num_experts=NUM_EXPERTS))
    assert out.shape == (0, HIDDEN)


def test_fp8_per_tensor_quantizes_by_the_rows_of_its_group(expert_layer):
    cases = [FP8_TENSOR, None, FP8_TENSOR, None, None, None, None, None]
    x, topk = inputs(9), route(9, num_experts=NUM_EXPERTS)
    assert relative_error(loaded(expert_layer, cases)(x, topk), exact(cases, x, topk)) < 0.07


@pytest.mark.parametrize(
    "options", [{"activation": "gelu"}, {"apply_router_weight_on_input": True}]
)
def test_children_do_as_the_layer_is_told(expert_layer, options):
    cases: list[Case | None] = [FP8, None, INT8, None, FP8, None, INT8, None]
    x, topk = inputs(6), route(6, num_experts=NUM_EXPERTS)
    told = {
        "activation": options.get("activation", "silu"),
        "on_input": "apply_router_weight_on_input" in options,
    }
    out = loaded(expert_layer, cases, **options)(x, topk)
    assert relative_error(out, exact(cases, x, topk, **told)) < 0.07


def test_children_are_sglangs_layers_with_the_methods_of_their_scheme(expert_layer):
    layer = make_layer(expert_layer, MIXED)
    assert [type(child) for child in layer.expert_groups] == [expert_layer] * 7
    assert [type(child.quant_method).__name__ for child in layer.expert_groups] == [
        "Fp8MoEMethod", "AWQMoEMethod", "W8A8FP8MoEMethod", "GPTQMarlinMoEMethod",
        "BlockInt8MoEMethod", "GPTQMarlinMoEMethod", "UnquantizedFusedMoEMethod",
    ]  # fmt: skip
    assert [child.num_experts for child in layer.expert_groups] == [1, 2, 1, 1, 1, 1, 1]
    assert layer.runner is None
    assert layer.runner_backend is None


def test_weights_are_held_by_the_children_alone(expert_layer):
    layer = make_layer(expert_layer, MIXED)
    assert not list(layer.parameters(recurse=False))


def test_experts_of_a_plain_layer_are_placed_in_itself(expert_layer):
    from mixedprec_plugin.experts.loading import load_expert_tensor

    layer = make_case(expert_layer, None)
    weight = torch.randn(HIDDEN, INTERMEDIATE).bfloat16()
    load_expert_tensor(layer, 3, "w2", "weight", weight)
    assert torch.equal(layer.w2_weight.data[3], weight)


def test_tensor_of_another_scheme_is_refused(expert_layer):
    from mixedprec_plugin.experts.loading import load_expert_tensor

    layer = make_layer(expert_layer, MIXED)
    text = r"experts: expert 1: has no parameter 'w13_weight' in AWQMoEMethod \(expected w13_q"
    with pytest.raises(LoadError, match=text):
        load_expert_tensor(layer, 1, "w1", "weight", torch.empty(1))


def test_second_load_replaces_the_first(expert_layer):
    layer = loaded(expert_layer, MIXED)
    for child in layer.expert_groups:
        restore = getattr(child.quant_method, "restore_weights_before_loading", None)
        if restore is not None:
            restore(child)
    place(layer, stored(MIXED, seed=5))
    process(layer)
    fresh = make_layer(expert_layer, MIXED)
    place(fresh, stored(MIXED, seed=5))
    process(fresh)
    x, topk = inputs(7), route(7, num_experts=NUM_EXPERTS)
    assert torch.equal(layer(x, topk), fresh(x, topk))


def test_ranks_add_up_to_the_whole(expert_layer):
    cases: list[Case | None] = [FP8, AWQ, None, GPTQ, INT8, AWQ, GPTQ8, None]
    x, topk = inputs(6), route(6, num_experts=NUM_EXPERTS)
    total = torch.zeros(6, HIDDEN)
    for rank in range(2):
        with one_of_two_ranks(rank):
            layer = make_layer(expert_layer, cases)
        place(layer, stored(cases))
        process(layer)
        assert layer.expert_groups[0].w2_weight.shape == (1, HIDDEN, INTERMEDIATE // 2)
        total += layer(x, topk).float()
    assert relative_error(total, exact(cases, x, topk)) < 0.07


@pytest.mark.parametrize("cases", [MIXED, WEIGHT_ONLY, [AWQ] * 4 + [FP8] * 4, [None] + [AWQ] * 7])
def test_ranks_that_share_experts_add_up_to_the_whole(expert_layer, cases):
    """Of the last two, a rank has experts of one scheme alone."""
    x, topk = inputs(9), route(9, num_experts=NUM_EXPERTS)
    whole = loaded(expert_layer, cases)
    total, held = torch.zeros(9, HIDDEN), 0
    for rank in range(2):
        with one_of_two_owners(rank):
            layer = make_layer(expert_layer, cases, reduce_results=False)
            place(layer, stored(cases))
            process(layer)
            schemes = {str(case) for case in cases[4 * rank : 4 * rank + 4]}
            assert len(layer.expert_groups) == len(schemes)
            held += sum(child.num_experts for child in layer.expert_groups)
            total += layer(x, topk).float()
    assert held == NUM_EXPERTS
    # each rank rounds its sum to bfloat16
    assert relative_error(total, whole(x, topk).float().numpy()) < 0.006


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        (((0, 1), (3,)), "experts 2 are in no group"),
        (((0, 1), (2, 3, 4)), r"experts 4 do not exist (expected 0 to 3)"),
    ],
)
def test_groups_that_are_no_partition_are_refused(expert_layer, ids, text):
    config = MixedConfig([make_group(own) for own in ids])
    with pytest.raises(LoadError, match=re.escape(f"experts: {text}")):
        make_experts(expert_layer, config, num_experts=4)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_fused_shared_experts": 1}, "start with --disable-shared-experts-fusion"),
        ({"no_combine": True}, "the model wants the experts' outputs apart"),
    ],
)
def test_layers_that_need_one_method_are_refused(expert_layer, options, text):
    with pytest.raises(LoadError, match=text):
        make_layer(expert_layer, MIXED, **options)


def test_group_that_sglang_would_leave_unquantized_is_refused(expert_layer):
    class Skipping(type(make_config(AWQ))):
        def get_quant_method(self, layer: Any, prefix: str) -> None:
            return None

    config = Skipping(4, 64, True)
    for others in ((), (make_group((1, 2, 3)),)):
        ids = (0,) if others else (0, 1, 2, 3)
        groups = [make_group(ids, AWQ, config), *others]
        with pytest.raises(LoadError, match=r"would leave .*experts.* unquantized, not in awq"):
            make_experts(expert_layer, MixedConfig(groups), num_experts=4)


@pytest.mark.parametrize("case", [None, FP8, AWQ], ids=str)
def test_one_group_gets_the_method_of_its_config(expert_layer, case):
    layer = make_layer(expert_layer, [case] * 4)
    assert not hasattr(layer, "expert_groups")
    expected = make_experts(expert_layer) if case is None else make_case(expert_layer, case)
    assert type(layer.quant_method) is type(expected.quant_method)
