"""Faults of SGLang's that `methods.mxfp4.sglang` cures: when one is gone, so is its cure."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixedprec_plugin.errors import MethodError

pytestmark = [pytest.mark.sglang, pytest.mark.filterwarnings("ignore")]
HIDDEN, INNER, NUM_EXPERTS = 320, 96, 3


@pytest.fixture
def layer() -> Any:
    """What SGLang asks of a layer of experts while it creates its parameters."""
    made = torch.nn.Module()
    config = SimpleNamespace(apply_router_weight_on_input=False)
    given = {
        "num_local_experts": NUM_EXPERTS, "hidden_size": HIDDEN, "layer_name": "mlp.experts",
        "intermediate_size_per_partition": INNER, "with_bias": False, "moe_runner_config": config,
    }  # fmt: skip
    for name, value in given.items():
        setattr(made, name, value)
    return made


@pytest.fixture
def method(expert_layer: Any) -> Any:
    """SGLang's own, as it is with --moe-runner-backend marlin."""
    from sglang.srt.layers.quantization.mxfp4 import Mxfp4MoEMethod

    made = Mxfp4MoEMethod("mlp.experts")
    made.use_marlin = True
    return made


def create(method: Any, layer: Any) -> dict[str, tuple[int, ...]]:
    method.create_weights(layer, NUM_EXPERTS, HIDDEN, INNER, torch.bfloat16)
    return {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}


def test_sglang_pads_hidden_sizes_and_makes_biases(method: Any, layer: Any) -> None:
    made = create(method, layer)
    assert made["w2_weight"] == (NUM_EXPERTS, 512, 64)
    assert {"w13_weight_bias", "w2_weight_bias"} <= made.keys()


def test_experts_have_the_checkpoints_sizes_and_no_biases(method: Any, layer: Any) -> None:
    from mixedprec_plugin.methods.mxfp4.sglang import run_in_marlin

    assert create(run_in_marlin(method), layer) == {
        "w13_weight": (NUM_EXPERTS, 2 * INNER, HIDDEN // 2),
        "w13_weight_scale": (NUM_EXPERTS, 2 * INNER, HIDDEN // 32),
        "w2_weight": (NUM_EXPERTS, HIDDEN, INNER // 2),
        "w2_weight_scale": (NUM_EXPERTS, HIDDEN, INNER // 32),
    }
    assert (method.use_marlin, method.use_deep_gemm) == (True, False)
    assert method.hidden_size == HIDDEN


def test_the_runner_does_not_multiply_by_the_factor_of_routed_experts() -> None:
    from sglang.srt.layers.moe.fused_moe_triton.fused_marlin_moe import fused_marlin_moe

    source = inspect.getsource(inspect.unwrap(fused_marlin_moe))
    in_mxfp4 = source.split("    if is_mxfp4_marlin:\n")[-1].split("    else:\n        if routed")[
        0
    ]
    assert "moe_topk_sum" in in_mxfp4
    assert "routed_scaling_factor" not in in_mxfp4


def test_the_router_is_told_to_multiply(method: Any) -> None:
    from sglang.srt.layers.moe.fused_moe_triton.layer import _fuses_routed_scaling_factor_in_topk
    from sglang.srt.layers.moe.utils import MoeRunnerBackend

    from mixedprec_plugin.methods.mxfp4.sglang import run_in_marlin

    backend = MoeRunnerBackend.MARLIN
    assert not _fuses_routed_scaling_factor_in_topk(method, backend)
    assert _fuses_routed_scaling_factor_in_topk(run_in_marlin(method), backend)


def test_router_weights_on_the_inputs_are_refused(method: Any, layer: Any) -> None:
    from mixedprec_plugin.methods.mxfp4.sglang import run_in_marlin

    layer.moe_runner_config.apply_router_weight_on_input = True
    with pytest.raises(MethodError, match="do not compute the router weight on the input"):
        create(run_in_marlin(method), layer)
