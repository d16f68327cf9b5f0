"""Per-channel FP8 experts on the CPU: SGLang's weights and loaders, CUDA's arithmetic in torch."""

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
from sglang.srt.layers.quantization import w8a8_fp8

from mixedprec_plugin.cpu.activation import quantize_fp8_tokens
from mixedprec_plugin.cpu.channel_matmul import channel_matmul
from mixedprec_plugin.cpu.expert_checks import check_form
from mixedprec_plugin.cpu.experts import ACTIVATIONS, Product, Rows, run_layer, weigh


class W8A8FP8MoEMethod(w8a8_fp8.W8A8FP8MoEMethod):
    """SGLang's `W8A8FP8MoEMethod` with torch arithmetic."""

    def create_weights(self, layer: FusedMoE, *args: Any, **kwargs: Any) -> None:
        """Create SGLang's parameters.

        Raises:
            MethodError: what the CPU platform does not run.
        """
        check_form(layer, "fp8_channel", ACTIVATIONS)
        super().create_weights(layer, *args, **kwargs)

    def create_moe_runner(self, layer: FusedMoE, moe_runner_config: MoeRunnerConfig) -> None:
        """Keep the config: the loop of `experts.py` needs no runner."""
        self.moe_runner_config = moe_runner_config

    def process_weights_after_loading(self, layer: FusedMoE) -> None:
        """Leave the parameters as they were loaded, so that they can be loaded again."""

    def apply(
        self, layer: FusedMoE, dispatch_output: StandardDispatchOutput
    ) -> StandardCombineInput:
        """Run the experts, [T, H] -> [T, H]."""
        gate_up = partial(_prepare, layer.w13_weight.data, layer.w13_weight_scale.data)
        down = partial(_prepare, layer.w2_weight.data, layer.w2_weight_scale.data)
        return run_layer(layer, dispatch_output, self.moe_runner_config, gate_up, down)


def _prepare(weights: torch.Tensor, scales: torch.Tensor, x: torch.Tensor) -> Product:
    """Quantize [R, K] with a scale a row; weights [E, N, K], scales [E, N, 1]."""
    codes, token_scales = quantize_fp8_tokens(x)

    def multiply(expert: int, rows: Rows, router_weights: torch.Tensor | None) -> torch.Tensor:
        product = channel_matmul(
            codes[rows], token_scales[rows], weights[expert], scales[expert], torch.float32
        )
        return weigh(product, router_weights, x.dtype)

    return multiply
