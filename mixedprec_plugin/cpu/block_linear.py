"""What the linear methods with a scale a block do: SGLang's weights, CUDA's arithmetic in torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from sglang.srt.layers.linear import LinearBase

from mixedprec_plugin.cpu.block_matmul import block_matmul


def multiply_blocks(
    layer: LinearBase,
    quantize: Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]],
    block_size: list[int],
    rows: torch.Tensor,
) -> torch.Tensor:
    """Quantize activations in groups along K and multiply them by a layer's weight.

    Args:
        layer: holds `weight` [N, K] and `weight_scale_inv`, a scale a block.
        quantize: rows and the length of a group -> codes [T, K] and scales [T, K/BK].
        block_size: [BN, BK].
        rows: [T, K].
    Returns:
        [T, N] in the dtype of rows.
    """
    block_n, block_k = block_size
    codes, scales = quantize(rows, block_k)
    weight, weight_scales = layer.weight.data, layer.weight_scale_inv.data
    return block_matmul(codes, scales, weight, weight_scales, (block_n, block_k), rows.dtype)
