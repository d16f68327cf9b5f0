"""GPTQ linear layers on the CPU: SGLang's weights and loaders, a torch matmul."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization.gptq import GPTQMarlinConfig
from sglang.srt.layers.quantization.gptq.schemes import GPTQMarlinLinearScheme

from mixedprec_plugin.cpu.weight_only import dequantize_gptq, matmul


class CpuGPTQLinearScheme(GPTQMarlinLinearScheme):
    """SGLang's `GPTQMarlinLinearScheme` with a torch matmul in the activation's dtype."""

    def __init__(self, quant_config: GPTQMarlinConfig) -> None:
        # Not the parent's constructor: it asks for the card's compute capability.
        self.quant_config = quant_config
        self.kernel = SimpleNamespace()

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Leave the parameters as they were loaded, so that they can be loaded again."""

    def apply_weights(
        self, layer: LinearBase, x: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Multiply [..., K] by the dequantized weight, [..., N]; the bias is added afterwards."""
        groups = layer.g_idx.data if self.quant_config.desc_act else None
        bits = self.quant_config.weight_bits
        weight = dequantize_gptq(layer.qweight.data, layer.scales.data, bits, groups)
        return matmul(x, weight, bias)
