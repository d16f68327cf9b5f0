"""FP8 linear layers on the CPU: SGLang's weights and loaders, CUDA's arithmetic in torch."""

from __future__ import annotations

from functools import partial

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization import fp8
from sglang.srt.layers.quantization.utils import convert_to_channelwise

from mixedprec_plugin.cpu.activation import quantize_fp8_groups
from mixedprec_plugin.cpu.block_linear import multiply_blocks
from mixedprec_plugin.cpu.channel_linear import multiply_channels
from mixedprec_plugin.cpu.rows import multiply_rows


class Fp8LinearMethod(fp8.Fp8LinearMethod):
    """SGLang's `Fp8LinearMethod` with torch arithmetic, per tensor and per block.

    The name is SGLang's: linear layers choose their weight loader by it
    (sglang/srt/layers/linear.py:140).
    """

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Leave the parameters as they were loaded, so that they can be loaded again.

        Per tensor, every shard's scale is spread over the shard's channels; nothing is
        requantized, as on NVIDIA (fp8.py:1201).
        """
        if self.block_quant:
            return
        layer.channel_scales = convert_to_channelwise(layer.weight_scale.data, layer.logical_widths)
        static = layer.input_scale is not None
        layer.token_scale = layer.input_scale.data.max() if static else None

    def apply(
        self, layer: LinearBase, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Quantize the activations and multiply.

        Args:
            layer: a linear layer with weights of this method.
            x: [..., K].
            bias: [N] or None.
        Returns:
            [..., N] in the dtype of x.
        """
        if self.block_quant:
            block_size = self.quant_config.weight_block_size
            multiply = partial(multiply_blocks, layer, quantize_fp8_groups, block_size)
            return multiply_rows(multiply, x, bias)
        weight, scales = layer.weight.data, layer.channel_scales
        multiply = partial(multiply_channels, layer, weight, scales, layer.token_scale)
        return multiply_rows(multiply, x, bias)
