"""Unquantized experts on the CPU that take masked ids, for groups of a composite layer.

A layer whose experts are all unquantized keeps SGLang's own method.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig
from sglang.srt.layers.moe.token_dispatcher.standard import (
    StandardCombineInput,
    StandardDispatchOutput,
)
from sglang.srt.layers.quantization import unquant
from torch.nn.functional import linear

from mixedprec_plugin.cpu.expert_checks import check_form
from mixedprec_plugin.cpu.experts import ACTIVATIONS, Product, Rows, run_layer, weigh


class UnquantizedFusedMoEMethod(unquant.UnquantizedFusedMoEMethod):
    """SGLang's `UnquantizedFusedMoEMethod` with an expert loop that takes masked ids."""

    def create_weights(self, layer: FusedMoE, *args: Any, **kwargs: Any) -> None:
        """Create SGLang's parameters.

        Raises:
            MethodError: what the CPU platform does not run.
        """
        check_form(layer, "bf16", ACTIVATIONS)
        super().create_weights(layer, *args, **kwargs)

    def create_moe_runner(self, layer: FusedMoE, moe_runner_config: MoeRunnerConfig) -> None:
        """Keep the config: the loop of `experts.py` needs no runner."""
        self.moe_runner_config = moe_runner_config

    def process_weights_after_loading(self, layer: FusedMoE) -> None:
        """Leave the parameters as they were loaded."""

    def apply(
        self, layer: FusedMoE, dispatch_output: StandardDispatchOutput
    ) -> StandardCombineInput:
        """Run the experts, [T, H] -> [T, H]."""
        gate_up = partial(_prepare, layer.w13_weight.data)
        down = partial(_prepare, layer.w2_weight.data)
        return run_layer(layer, dispatch_output, self.moe_runner_config, gate_up, down)


def _prepare(weights: torch.Tensor, x: torch.Tensor) -> Product:
    """[R, K], weights [E, N, K]."""

    def multiply(expert: int, rows: Rows, router_weights: torch.Tensor | None) -> torch.Tensor:
        return weigh(_multiply(x[rows], weights[expert]), router_weights, x.dtype)

    return multiply


def _multiply(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[t, N], in float32 where that is as fast as rounding it once more before the router weight.

    Without AVX-512 torch multiplies 16-bit matrices one by one; see `weight_only.multiply`.
    """
    if rows.shape[0] > 1 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return linear(rows.float(), weight.float())
    return linear(rows, weight).float()
