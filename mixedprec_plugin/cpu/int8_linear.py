"""INT8 block linear layers on the CPU: SGLang's weights and loaders, CUDA's arithmetic in torch."""

from __future__ import annotations

from functools import partial

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization import blockwise_int8

from mixedprec_plugin.cpu.activation import quantize_int8_groups
from mixedprec_plugin.cpu.block_linear import multiply_blocks
from mixedprec_plugin.cpu.rows import multiply_rows


class BlockInt8LinearMethod(blockwise_int8.BlockInt8LinearMethod):
    """SGLang's `BlockInt8LinearMethod` with torch arithmetic.

    The name is SGLang's: linear layers choose their weight loader by it
    (sglang/srt/layers/linear.py:140).
    """

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Leave the parameters as they were loaded, so that they can be loaded again."""

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
        block_size = self.quant_config.weight_block_size
        multiply = partial(multiply_blocks, layer, quantize_int8_groups, block_size)
        return multiply_rows(multiply, x, bias)
