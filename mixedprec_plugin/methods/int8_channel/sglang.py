"""Per-channel INT8: the GPUs that have kernels for it, and its arithmetic on the CPU platform.

`W8A8Int8Config` says that it runs from compute capability 7.5 on (w8a8_int8.py:88); sglang-kernel
0.4.10 is compiled for 8.0 and up, and its `int8_scaled_mm` has no code for more than 9.0.
"""

from __future__ import annotations

from functools import partial

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.quantization import w8a8_int8
from sglang.srt.layers.quantization.base_config import QuantizeMethodBase

from mixedprec_plugin.cpu.activation import quantize_int8_tokens
from mixedprec_plugin.cpu.config import CpuConfig
from mixedprec_plugin.cpu.experts import LoopedExperts, Prepare, prepare_rows
from mixedprec_plugin.cpu.linear import QuantizedLinear, multiply_channels, multiply_rows
from mixedprec_plugin.errors import MethodError, Problem
from mixedprec_plugin.methods.construct import cuda_capability
from mixedprec_plugin.methods.int8_channel import METHOD, too_new

UNSUMMED_EXPERTS = (w8a8_int8.W8A8Int8MoEMethod,)


class ChannelInt8Config(w8a8_int8.W8A8Int8Config):
    """`W8A8Int8Config` that refuses GPUs on which its first matmul would fail."""

    @classmethod
    def get_min_capability(cls) -> int:
        """Of the GPUs that SGLang's kernels are compiled for."""
        return METHOD.min_capability

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """SGLang's own method, but of a linear layer on a GPU that the matmul has no code for."""
        capability = cuda_capability()
        if isinstance(layer, LinearBase) and capability and (text := too_new(capability)):
            raise MethodError(Problem(prefix, text, "give the layer another method"))
        return super().get_quant_method(layer, prefix)


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
        return prepare_rows(layer, quantize_int8_tokens)


class CpuChannelInt8Config(CpuConfig, w8a8_int8.W8A8Int8Config):
    """`W8A8Int8Config` on the CPU."""

    methods = (W8A8Int8LinearMethod, W8A8Int8MoEMethod)
