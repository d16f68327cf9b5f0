"""Every method in SGLang's own layer of experts, loaded through SGLang's own loaders."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cpu.expert_layers import (
    HIDDEN,
    INTERMEDIATE,
    NUM_EXPERTS,
    TOP_K,
    dense,
    evaluate,
    load_experts,
    make_case,
    process,
    relative_error,
    route,
    stored_experts,
)
from tests.cpu.layers import Case

WEIGHT_ONLY: list[Case | None] = [
    None,
    Case("awq", {"bits": 4, "group_size": 128}),
    Case("awq", {"bits": 4, "group_size": 32}),
    Case("gptq", {"bits": 4, "group_size": 128}),
    Case("gptq", {"bits": 4, "group_size": -1}),
    Case("gptq", {"bits": 8, "group_size": 64}),
    Case("gptq", {"bits": 8, "group_size": -1}),
    Case("nvfp4", {"keep_input_scale": False}),
    Case("mxfp4", {}),
]
QUANTIZED: list[Case | None] = [
    Case("fp8", {"weight_block_size": None}),
    Case("fp8", {"weight_block_size": [128, 128]}),
    Case("fp8_channel", {}),
    Case("blockwise_int8", {"weight_block_size": [128, 128]}),
    Case("int8_channel", {}),
]
CASES = WEIGHT_ONLY + QUANTIZED
# Root mean squares of the worst token: weights and each product are rounded to bfloat16;
# activations rounded to FP8 (0.026) or truncated to INT8 (0.023) twice, for the two products.
WEIGHT_TOLERANCE = 0.009
TOLERANCE = dict.fromkeys(("fp8", "fp8_channel", "blockwise_int8", "int8_channel"), 0.07)


def _loaded(layer_class: type, case: Case | None, seed: int = 0, **options: Any) -> Any:
    layer = make_case(layer_class, case, **options)
    load_experts(layer, stored_experts(case, seed=seed))
    process(layer)
    return layer


def _inputs(num_tokens: int) -> torch.Tensor:
    return torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(7)).bfloat16()


def _exact(case: Case | None, x: torch.Tensor, topk: Any, seed: int = 0, **options: Any) -> Any:
    experts = [dense(case, stored) for stored in stored_experts(case, seed=seed)]
    return evaluate(x, topk, experts, **options)


def _tolerance(case: Case | None) -> float:
    return WEIGHT_TOLERANCE if case is None else TOLERANCE.get(case.method, WEIGHT_TOLERANCE)


@pytest.mark.parametrize("num_tokens", [1, 6, 70])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_is_near_the_dense_evaluation(expert_layer, case, num_tokens):
    layer, x, topk = _loaded(expert_layer, case), _inputs(num_tokens), route(num_tokens)
    out = layer(x, topk)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, _exact(case, x, topk)) < _tolerance(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_masked_experts_add_nothing(expert_layer, case):
    layer, x = _loaded(expert_layer, case), _inputs(4)
    ids = torch.tensor([[-1, 2, -1], [-1, -1, -1], [4, 0, 1], [3, -1, 0]], dtype=torch.int32)
    topk = route(4, ids)
    out = layer(x, topk)
    assert not out[1].any()
    assert relative_error(out, _exact(case, x, topk)) < _tolerance(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layer_whose_experts_are_all_masked_gives_zeros(expert_layer, case):
    topk = route(2, torch.full((2, TOP_K), -1, dtype=torch.int32))
    out = _loaded(expert_layer, case)(_inputs(2), topk)
    assert torch.equal(out, torch.zeros(2, HIDDEN, dtype=torch.bfloat16))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_tokens_give_no_rows(expert_layer, case):
    assert _loaded(expert_layer, case)(_inputs(0), route(0)).shape == (0, HIDDEN)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_input_stays_as_it_is(expert_layer, case):
    layer, x = _loaded(expert_layer, case), _inputs(5)
    before = x.clone()
    layer(x, route(5))
    assert torch.equal(x, before)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("case", [None, *QUANTIZED], ids=str)
def test_gelu_is_run(expert_layer, case, activation):
    layer = _loaded(expert_layer, case, activation=activation)
    x, topk = _inputs(6), route(6)
    exact = _exact(case, x, topk, activation=activation)
    assert relative_error(layer(x, topk), exact) < _tolerance(case)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c is None or c.method not in ("gptq", "mxfp4")], ids=str
)
def test_router_weight_may_multiply_the_input(expert_layer, case):
    layer = _loaded(expert_layer, case, apply_router_weight_on_input=True)
    x, topk = _inputs(6), route(6)
    exact = _exact(case, x, topk, on_input=True)
    assert relative_error(layer(x, topk), exact) < _tolerance(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_of_every_choice_sum_to_the_whole(expert_layer, case):
    layer, x, topk = _loaded(expert_layer, case), _inputs(6), route(6)
    whole = layer(x, topk)
    layer.moe_runner_config.no_combine = True
    layer.moe_runner_config.no_combine_keep_router_weight = True
    parts = layer(x, topk)
    assert parts.shape == (6, TOP_K, HIDDEN)
    assert torch.equal(parts.sum(1, dtype=torch.float32).bfloat16(), whole)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_second_load_replaces_the_first(expert_layer, case):
    layer, x, topk = _loaded(expert_layer, case), _inputs(6), route(6)
    restore = getattr(layer.quant_method, "restore_weights_before_loading", None)
    if restore is not None:
        restore(layer)
    load_experts(layer, stored_experts(case, seed=5))
    process(layer)
    assert torch.equal(layer(x, topk), _loaded(expert_layer, case, seed=5)(x, topk))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_parameter_is_filled_by_the_checkpoint(expert_layer, case):
    layer = make_case(expert_layer, case)
    for parameter in layer.parameters():
        parameter.data.fill_(100)
    load_experts(layer, stored_experts(case))
    for name, parameter in layer.named_parameters():
        filled = (parameter.data.float() != 100).float()
        # an integer may be 100 by itself
        assert not filled.numel() or filled.mean() > 0.9, name


def _kept_bytes(layer: Any) -> int:
    """Bytes of all tensors of a layer, of its scheme and of the scheme's packed weights."""
    tensors: list[Any] = [*layer.parameters(), *layer.buffers()]
    for weights in getattr(layer.scheme, "_weights", {}).values():
        for weight in weights or ():
            tensors += vars(weight).values()
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in tensors
        if isinstance(tensor, torch.Tensor)
    }
    return sum(storages.values())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_stay_packed_in_memory(expert_layer, case):
    layer = _loaded(expert_layer, case)
    stored = sum(
        tensor.numel() * tensor.element_size()
        for projections in stored_experts(case)
        for tensors in projections.values()
        for tensor in tensors.values()
    )
    # The kernel for int4 wants an offset beside every scale: a fifth more for groups of 32.
    assert _kept_bytes(layer) <= 1.25 * stored


def test_unquantized_experts_agree_with_sglangs_own(expert_layer):
    from tests.cpu.expert_layers import make_experts

    own, theirs = _loaded(expert_layer, None), make_experts(expert_layer)
    load_experts(theirs, stored_experts(None))
    x, topk = _inputs(33), route(33)
    difference = (own(x, topk).float() - theirs(x, topk).float()).abs()
    assert difference.max() <= 2**-7 * theirs(x, topk).abs().max()


def test_fp8_gate_and_up_share_the_greater_scale(expert_layer):
    case = QUANTIZED[0]
    layer = _loaded(expert_layer, case)
    stored = stored_experts(case)
    greatest = [max(float(s[w]["weight_scale"]) for w in ("w1", "w3")) for s in stored]
    assert layer.w13_weight_scale.data.t().tolist() == [greatest, greatest]


def test_static_fp8_takes_the_greatest_scale_of_the_layer(expert_layer):
    plain = Case("fp8", {"weight_block_size": None})
    layer = make_case(
        expert_layer, Case("fp8", {"weight_block_size": None, "activation_scheme": "static"})
    )
    load_experts(layer, stored_experts(plain))
    for name in ("w13_input_scale", "w2_input_scale"):
        parameter = getattr(layer, name)
        for expert in range(NUM_EXPERTS):
            scale = torch.tensor(0.01 * (1 + expert))
            parameter.weight_loader(parameter, scale, f"experts.{name}", "w1", expert)
    process(layer)
    assert float(layer.gate_up_scale) == float(layer.down_scale) == pytest.approx(0.05)
    x, topk = _inputs(6), route(6)
    assert relative_error(layer(x, topk), _exact(plain, x, topk)) < TOLERANCE["fp8"]


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_columns_take_the_scale_that_g_idx_names(expert_layer, bits):
    case = Case("gptq", {"bits": bits, "group_size": 64, "desc_act": True})
    plain = Case("gptq", {"bits": bits, "group_size": 64})
    generator = torch.Generator().manual_seed(3)
    stored = []
    for projections in stored_experts(plain):
        orders = {
            size: torch.randperm(size, generator=generator) for size in (HIDDEN, INTERMEDIATE)
        }
        stored.append(
            {
                shard: {**tensors, "g_idx": tensors["g_idx"][orders[tensors["g_idx"].numel()]]}
                for shard, tensors in projections.items()
            }
        )
    layer, x, topk = make_case(expert_layer, case), _inputs(6), route(6)
    load_experts(layer, stored)
    words = layer.w13_qweight.data.clone()
    process(layer)
    exact = evaluate(x, topk, [dense(case, projections) for projections in stored])
    assert relative_error(layer(x, topk), exact) < WEIGHT_TOLERANCE
    layer.quant_method.restore_weights_before_loading(layer)
    assert torch.equal(layer.w13_qweight.data, words)


def test_experts_on_shapes_of_no_kernel_are_dequantized(expert_layer):
    case = Case("awq", {"bits": 4, "group_size": 16})
    layer, x, topk = _loaded(expert_layer, case), _inputs(6), route(6)
    assert layer.w13_qweight.dtype == torch.int32
    assert relative_error(layer(x, topk), _exact(case, x, topk)) < WEIGHT_TOLERANCE
