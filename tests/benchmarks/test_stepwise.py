"""A reference that takes an engine's inputs, and its experts where rounding explains them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.families.stepwise import ROUNDING, Follower
from benchmarks.families.trace import Trace


def mixtral(weight: torch.Tensor) -> Any:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

    config = MixtralConfig(
        hidden_size=weight.shape[1], num_local_experts=len(weight), num_experts_per_tok=2
    )
    router = MixtralTopKRouter(config)
    router.weight.data = weight
    return router


def followed(router: Any, chosen: list[int], *, takes_inputs: bool = True) -> tuple[Any, Follower]:
    follower = Follower(
        Trace(choices={"experts": [torch.tensor([chosen])]}), takes_inputs=takes_inputs
    )
    follower.follow_choices(router, "experts")
    return router(torch.ones(1, 1)), follower


def test_experts_within_a_rounding_are_followed() -> None:
    near = 4.0 * (1 - ROUNDING)
    router = mixtral(torch.tensor([[1.0], [4.0], [near], [8.0]]))
    (_, weights, ids), follower = followed(router, [2, 3])
    assert sorted(ids[0].tolist()) == [2, 3]
    assert (follower.steps.tied, follower.steps.elsewhere) == (1, 0)
    # exp(8) / (exp(8) + exp(4)), but for the rounding
    assert weights[0].sort().values.tolist() == pytest.approx([0.018, 0.982], abs=1e-3)


def test_experts_further_apart_are_not() -> None:
    router = mixtral(torch.tensor([[1.0], [4.0], [4.0 * (1 - 3 * ROUNDING)], [8.0]]))
    (_, _, ids), follower = followed(router, [2, 3])
    assert sorted(ids[0].tolist()) == [1, 3]
    assert (follower.steps.tied, follower.steps.elsewhere) == (0, 1)


def test_reference_with_inputs_of_its_own_follows_further() -> None:
    router = mixtral(torch.tensor([[1.0], [4.0], [4.0 * (1 - 3 * ROUNDING)], [8.0]]))
    (_, _, ids), _ = followed(router, [2, 3], takes_inputs=False)
    assert sorted(ids[0].tolist()) == [2, 3]


def test_choice_of_a_group_of_experts_is_followed() -> None:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    config = DeepseekV3Config(
        hidden_size=1, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1
    )
    router = DeepseekV3TopkRouter(config)
    router.weight.data = torch.tensor([[1.0], [1.0], [1.0], [1.0 - ROUNDING]])
    assert sorted(router(torch.ones(1, 1))[2][0].tolist()) == [0, 1]
    (_, _, ids), follower = followed(router, [2, 3])
    assert sorted(ids[0].tolist()) == [2, 3]
    assert follower.steps.tied == 1


def test_inputs_of_layers_are_measured_and_replaced() -> None:
    theirs = torch.tensor([[3.0, 4.0], [0.0, 5.0]])
    layer = torch.nn.Linear(2, 2, bias=False)
    layer.weight.data = torch.eye(2)
    follower = Follower(Trace(inputs={"a": [theirs]}), takes_inputs=True)
    follower.follow_input(layer, "a")
    own = torch.tensor([[[3.0, 4.0], [0.5, 5.0]]])
    assert torch.equal(layer(own), theirs[None])
    assert follower.steps.errors == {"a": pytest.approx(0.1)}


def test_layer_without_a_trace_is_missing() -> None:
    layer = torch.nn.Linear(2, 2)
    follower = Follower(Trace(), takes_inputs=True)
    follower.follow_input(layer, "model.layers.0.mlp.down_proj")
    layer(torch.ones(1, 2))
    assert follower.steps.missing == {"model.layers.0.mlp.down_proj"}
