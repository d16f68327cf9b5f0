"""AWQ experts on the CPU: SGLang's weights and loaders, torch matmuls."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig
from sglang.srt.layers.moe.token_dispatcher.standard import (
    StandardCombineInput,
    StandardDispatchOutput,
)
from sglang.srt.layers.quantization.awq import AWQConfig, awq
from sglang.srt.layers.quantization.awq.schemes import AWQMoEScheme

from mixedprec_plugin.cpu.expert_checks import check_form, check_multiple
from mixedprec_plugin.cpu.experts import run_layer
from mixedprec_plugin.cpu.heap import trim_heap
from mixedprec_plugin.cpu.int4 import Int4Weight, unpack_int4
from mixedprec_plugin.cpu.packed_experts import PackedWeight, pack_experts, prepare_weight_only
from mixedprec_plugin.cpu.weight_only import dequantize, multiply
from mixedprec_plugin.quantize.packing import pack_awq, unpack_awq

_PARTS = ("w13", "w2")


class AWQMoEMethod(awq.AWQMoEMethod):
    """SGLang's `AWQMoEMethod`, which can be loaded a second time."""

    def restore_weights_before_loading(self, layer: FusedMoE) -> None:
        """Give the parameters the checkpoint's layout again; their values stay."""
        layer.scheme.restore_weights_before_loading(layer)


class CpuAWQMoEScheme(AWQMoEScheme):
    """SGLang's `AWQMoEScheme`, the one that `AWQMarlinConfig` gives, with torch matmuls."""

    quant_config: AWQConfig

    def __init__(self, quant_config: AWQConfig) -> None:
        super().__init__(quant_config)
        self._weights: dict[str, list[PackedWeight] | None] = {}

    def _init_kernel(self, quant_config: AWQConfig) -> SimpleNamespace:
        """SGLang's kernel object needs a GPU; nothing here asks it for anything."""
        return SimpleNamespace()

    def create_weights(self, layer: FusedMoE, *args: Any, **kwargs: Any) -> None:
        """Create SGLang's parameters.

        Raises:
            MethodError, ShapeError: what the CPU platform does not run, or Marlin does not.
        """
        check_form(layer, "awq", ("silu",))
        check_multiple(layer, "awq", self.quant_config.group_size, "group size")
        super().create_weights(layer, *args, **kwargs)

    def create_moe_runner(self, layer: FusedMoE, moe_runner_config: MoeRunnerConfig) -> None:
        """Keep the config: the loop of `experts.py` needs no runner."""
        self.moe_runner_config = moe_runner_config

    def get_moe_runner_backend(self, layer: FusedMoE) -> None:
        """None: SGLang's name for a method that runs without one of its runners."""

    def process_weights_after_loading(self, layer: FusedMoE) -> None:
        """Replace the words by the layout of torch's kernel, where it takes the experts."""
        for part in _PARTS:
            if self._weights.get(part) is None:
                self._weights[part] = self._pack(layer, part)
        trim_heap()

    def restore_weights_before_loading(self, layer: FusedMoE) -> None:
        """Give the words AWQ's layout again; does nothing where they have it."""
        for part, weights in self._weights.items():
            if weights is not None:
                words = [pack_awq(unpack_int4(weight.packed)) for weight in weights]
                getattr(layer, f"{part}_qweight").data = torch.stack(words)
        self._weights.clear()

    def apply_weights(
        self, layer: FusedMoE, dispatch_output: StandardDispatchOutput
    ) -> StandardCombineInput:
        """Run the experts, [T, H] -> [T, H]."""
        config = self.moe_runner_config
        is_early = config.apply_router_weight_on_input
        gate_up, down = (
            partial(prepare_weight_only, partial(self._multiply, layer, part), is_early)
            for part in _PARTS
        )
        return run_layer(layer, dispatch_output, config, gate_up, down)

    def _pack(self, layer: FusedMoE, part: str) -> list[PackedWeight] | None:
        qweight, qzeros, scales = (
            getattr(layer, f"{part}_{suffix}") for suffix in ("qweight", "qzeros", "scales")
        )

        def pack(expert: int) -> PackedWeight | None:
            codes, zeros = unpack_awq(qweight.data[expert]), unpack_awq(qzeros.data[expert])
            return Int4Weight.pack(codes, scales.data[expert], zeros)

        return pack_experts(qweight, scales, pack)

    def _multiply(
        self, layer: FusedMoE, part: str, expert: int, rows: torch.Tensor
    ) -> torch.Tensor:
        """[t, K] -> [t, N]."""
        weights = self._weights[part]
        if weights is not None:
            return weights[expert].multiply(rows)
        codes, zeros = (
            unpack_awq(getattr(layer, f"{part}_{suffix}").data[expert])
            for suffix in ("qweight", "qzeros")
        )
        scales = getattr(layer, f"{part}_scales").data[expert]
        return multiply(rows, dequantize(codes, zeros, scales))
