"""Shards of a fused module with their own scales of the whole: made one, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mixedprec_plugin.errors import ShapeError
from mixedprec_plugin.methods.nvfp4 import codec
from tests.cpu.expert_layers import (
    HIDDEN,
    INTERMEDIATE,
    NUM_EXPERTS,
    load_experts,
    make_case,
    process,
    relative_error,
    route,
)
from tests.cpu.layers import Case, K, fill, make_config, make_layer

CASE = Case("nvfp4", {"keep_input_scale": False})


def stored(size: int, whole: float, seed: int, columns: int = K) -> dict[str, torch.Tensor]:
    """A weight whose codes are random, with a scale of the whole as another tool may choose it."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(size, columns // 16, generator=generator) * 96 + 32
    codes = torch.randint(0, 256, (size, columns // 2), generator=generator)
    return {
        "weight": codes.to(torch.uint8),
        "weight_scale": scales.to(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(whole),
    }


def weight_of(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return codec.read(tensors, {}).dequantize()


@pytest.mark.parametrize("wholes", [(2**-12, 2**-14), (3e-4, 3e-4 / 8), (5e-5, 5e-5)])
def test_scales_that_differ_by_a_power_of_two_are_made_one(
    linear_module: Any, wholes: tuple[float, float]
) -> None:
    layer = make_layer(linear_module, "merged", make_config(CASE), (256, 256), K)
    shards = [stored(256, whole, seed) for seed, whole in enumerate(wholes)]
    fill(layer, "merged", shards)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(9)).bfloat16()
    out = layer(x)[0]
    for shard, part in zip(shards, out.split(256, dim=1), strict=True):
        exact = (x.double() @ weight_of(shard).double().t()).numpy()
        # products are rounded to bfloat16, and so is the scale of the whole
        assert relative_error(part, exact) < 2**-8 + 2**-9


@pytest.mark.parametrize("wholes", [(3e-4, 2e-4), (2**-4, 2**-16)])
def test_others_are_refused_as_sglang_would_multiply_them_by_the_largest(
    linear_module: Any, wholes: tuple[float, float]
) -> None:
    layer = make_layer(linear_module, "merged", make_config(CASE), (256, 256), K)
    fill_parameters(layer, [stored(256, whole, seed) for seed, whole in enumerate(wholes)])
    with pytest.raises(ShapeError, match="SGLang multiplies all by the largest"):
        layer.quant_method.process_weights_after_loading(layer)


def fill_parameters(layer: Any, shards: list[dict[str, torch.Tensor]]) -> None:
    """Load the shards, and leave the layer as it is then."""
    parameters = dict(layer.named_parameters())
    for index, tensors in enumerate(shards):
        for suffix, tensor in tensors.items():
            parameters[suffix].weight_loader(parameters[suffix], tensor, index)


def test_gate_and_up_of_an_expert_are_made_one(expert_layer: type) -> None:
    """SGLang would take the gate's for both (modelopt_quant.py:2745)."""
    experts = [
        {
            "w1": stored(INTERMEDIATE, 2**-14, 3 * expert, HIDDEN),
            "w3": stored(INTERMEDIATE, 2**-13, 3 * expert + 1, HIDDEN),
            "w2": stored(HIDDEN, 2**-13, 3 * expert + 2, INTERMEDIATE),
        }
        for expert in range(NUM_EXPERTS)
    ]
    layer = make_case(expert_layer, CASE)
    load_experts(layer, experts)
    process(layer)
    x = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(7)).bfloat16()
    topk = route(4)
    expected = torch.zeros(4, HIDDEN, dtype=torch.float64)
    for token in range(4):
        for weight, expert in zip(topk.topk_weights[token], topk.topk_ids[token], strict=True):
            own = {name: weight_of(tensors).double() for name, tensors in
                   experts[int(expert)].items()}  # fmt: skip
            values = x[token].double()
            gate, up = own["w1"] @ values, own["w3"] @ values
            inner = gate * gate.sigmoid() * up
            expected[token] += float(weight) * (own["w2"] @ inner)
    assert relative_error(layer(x, topk), expected.numpy()) < 0.009
