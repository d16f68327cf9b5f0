"""Per-channel FP8 linear layers on the CPU: SGLang's weights and loaders, CUDA's arithmetic."""

from __future__ import annotations

from functools import partial

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization import w8a8_fp8

from mixedprec_plugin.cpu.channel_linear import multiply_channels
from mixedprec_plugin.cpu.rows import multiply_rows


class W8A8Fp8LinearMethod(w8a8_fp8.W8A8Fp8LinearMethod):
    """SGLang's `W8A8Fp8LinearMethod` with torch arithmetic.

    The name is SGLang's: linear layers choose their weight loader by it
    (sglang/srt/layers/linear.py:140).
    """

    def __init__(self, quantization_config: w8a8_fp8.W8A8Fp8Config) -> None:
        super().__init__(quantization_config)
        # what models look for, see serving/fp8_channel.py
        self.quant_config = quantization_config

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Leave the parameters as they were loaded, so that they can be loaded again.

        SGLang's own method transposes the weight and leaves its loader behind.
        """

    def apply(
        self, layer: LinearBase, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Quantize the activations, a scale a token, and multiply.

        Args:
            layer: a linear layer with weights of this method.
            x: [..., K].
            bias: [N] or None.
        Returns:
            [..., N] in the dtype of x.
        """
        weight, scales = layer.weight.data, layer.weight_scale.data
        return multiply_rows(partial(multiply_channels, layer, weight, scales, None), x, bias)
