"""Per-channel INT8 on the CPU platform: SGLang's weights and loaders, CUDA's arithmetic."""

from __future__ import annotations

from functools import partial

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.quantization import w8a8_int8

from mixedprec_plugin.cpu.activation import quantize_int8_tokens
from mixedprec_plugin.cpu.config import CpuConfig
from mixedprec_plugin.cpu.experts import LoopedExperts, Prepare, prepare_channels
from mixedprec_plugin.cpu.linear import QuantizedLinear, multiply_channels, multiply_rows

UNSUMMED_EXPERTS = (w8a8_int8.W8A8Int8MoEMethod,)


class W8A8Int8LinearMethod(QuantizedLinear, w8a8_int8.W8A8Int8LinearMethod):
    """SGLang's `W8A8Int8LinearMethod` with torch arithmetic."""

    def apply(
        self, layer: LinearBase, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[..., K] -> [..., N]; CUTLASS adds the bias [N] before it rounds the product."""
        scales = layer.weight_scale.data
        multiply = partial(multiply_channels, layer, quantize_int8_tokens, scales, bias=bias)
        return multiply_rows(multiply, x, None)


class W8A8Int8MoEMethod(LoopedExperts, w8a8_int8.W8A8Int8MoEMethod):
    """SGLang's `W8A8Int8MoEMethod` with torch arithmetic."""

    preset_name = "int8_channel"

    def prepare(self, layer: FusedMoE) -> tuple[Prepare, Prepare]:
        prepare = partial(prepare_channels, quantize_int8_tokens)
        return (
            partial(prepare, layer.w13_weight.data, layer.w13_weight_scale.data),
            partial(prepare, layer.w2_weight.data, layer.w2_weight_scale.data),
        )


class CpuW8A8Int8Config(CpuConfig, w8a8_int8.W8A8Int8Config):
    """`W8A8Int8Config` on the CPU."""

    methods = (W8A8Int8LinearMethod, W8A8Int8MoEMethod)
