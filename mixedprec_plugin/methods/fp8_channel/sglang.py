"""Per-channel FP8: what SGLang's models ask of it, and its arithmetic on the CPU platform.

DeepSeek's and GLM-4-MoE's models read `quant_method.quant_config.weight_block_size` of shared
experts whose weight is FP8 (models/deepseek_v2.py:968, models/glm4_moe.py:519), and
`W8A8Fp8LinearMethod` has no `quant_config`. They do so while they are built: the methods that run
on CUDA stay SGLang's own.
"""

from __future__ import annotations

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.quantization import w8a8_fp8
from sglang.srt.layers.quantization.base_config import QuantizeMethodBase

from mixedprec_plugin.cpu.activation import quantize_fp8_tokens
from mixedprec_plugin.cpu.config import CpuConfig
from mixedprec_plugin.cpu.experts import LoopedExperts, Prepare, prepare_rows
from mixedprec_plugin.cpu.linear import QuantizedLinear, multiply_channels

UNSUMMED_EXPERTS = (w8a8_fp8.W8A8FP8MoEMethod,)


class ChannelFp8Config(w8a8_fp8.W8A8Fp8Config):
    """`W8A8Fp8Config` whose linear methods know their config; there are no blocks."""

    weight_block_size: list[int] | None = None

    @classmethod
    def get_name(cls) -> str:
        """The method's name in presets."""
        return "fp8_channel"

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        method = super().get_quant_method(layer, prefix)
        if isinstance(method, w8a8_fp8.W8A8Fp8LinearMethod):
            method.quant_config = self
        return method


class W8A8Fp8LinearMethod(QuantizedLinear, w8a8_fp8.W8A8Fp8LinearMethod):
    """SGLang's `W8A8Fp8LinearMethod` with torch arithmetic."""

    def __init__(self, quantization_config: ChannelFp8Config) -> None:
        super().__init__(quantization_config)
        self.quant_config = quantization_config

    def multiply(self, layer: LinearBase, rows: torch.Tensor) -> torch.Tensor:
        """[T, K] -> [T, N] in the dtype of rows; activations get a scale a token."""
        return multiply_channels(layer, quantize_fp8_tokens, layer.weight_scale.data, rows)


class W8A8FP8MoEMethod(LoopedExperts, w8a8_fp8.W8A8FP8MoEMethod):
    """SGLang's `W8A8FP8MoEMethod` with torch arithmetic."""

    preset_name = "fp8_channel"

    def prepare(self, layer: FusedMoE) -> tuple[Prepare, Prepare]:
        return prepare_rows(layer, quantize_fp8_tokens)


class CpuChannelFp8Config(CpuConfig, ChannelFp8Config):
    """`W8A8Fp8Config` on the CPU."""

    methods = (W8A8Fp8LinearMethod, W8A8FP8MoEMethod)
