"""INT8 block experts on the CPU: SGLang's weights and loaders, CUDA's arithmetic in torch."""

from __future__ import annotations

from functools import partial
from typing import Any

from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig
from sglang.srt.layers.moe.token_dispatcher.standard import (
    StandardCombineInput,
    StandardDispatchOutput,
)
from sglang.srt.layers.quantization import blockwise_int8

from mixedprec_plugin.cpu.activation import quantize_int8_groups
from mixedprec_plugin.cpu.block_experts import prepare_blocks
from mixedprec_plugin.cpu.expert_checks import check_form, check_multiple
from mixedprec_plugin.cpu.experts import ACTIVATIONS, run_layer


class BlockInt8MoEMethod(blockwise_int8.BlockInt8MoEMethod):
    """SGLang's `BlockInt8MoEMethod` with torch arithmetic."""

    def create_weights(self, layer: FusedMoE, *args: Any, **kwargs: Any) -> None:
        """Create SGLang's parameters.

        Raises:
            MethodError, ShapeError: what the CPU platform does not run.
        """
        check_form(layer, "blockwise_int8", ACTIVATIONS)
        for unit in self.quant_config.weight_block_size:
            check_multiple(layer, "blockwise_int8", unit, "block size")
        super().create_weights(layer, *args, **kwargs)

    def create_moe_runner(self, layer: FusedMoE, moe_runner_config: MoeRunnerConfig) -> None:
        """Keep the config: the loop of `experts.py` needs no runner."""
        self.moe_runner_config = moe_runner_config

    def apply(
        self, layer: FusedMoE, dispatch_output: StandardDispatchOutput
    ) -> StandardCombineInput:
        """Run the experts, [T, H] -> [T, H]."""
        block_size = tuple(self.quant_config.weight_block_size)
        prepare = partial(prepare_blocks, quantize_int8_groups, block_size)
        gate_up = partial(prepare, layer.w13_weight.data, layer.w13_weight_scale_inv.data)
        down = partial(prepare, layer.w2_weight.data, layer.w2_weight_scale_inv.data)
        return run_layer(layer, dispatch_output, self.moe_runner_config, gate_up, down)
