"""What the linear methods with a scale a block do: SGLang's weights, CUDA's arithmetic in torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from sglang.srt.layers.linear import LinearBase

from mixedprec_plugin.cpu.block_matmul import add_blocks
from mixedprec_plugin.cpu.rank_sums import add_over_ranks


def multiply_blocks(
    layer: LinearBase,
    quantize: Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]],
    block_size: list[int],
    rows: torch.Tensor,
) -> torch.Tensor:
    """Quantize activations in groups along K and multiply them by a layer's weight.

    Args:
        layer: holds `weight` [N, K] and `weight_scale_inv`, a scale a block. Its ranks may share
            K; then the product of all is on the last rank, zeros on the others.
        quantize: rows and the length of a group -> codes [T, K] and scales [T, K/BK].
        block_size: [BN, BK].
        rows: [T, K].
    Returns:
        [T, N] in the dtype of rows.
    """
    block_n, block_k = block_size
    codes, scales = quantize(rows, block_k)
    weight, grid = layer.weight.data, layer.weight_scale_inv.data
    shape = (rows.shape[0], weight.shape[0])
    add = partial(add_blocks, codes, scales, weight, grid, (block_n, block_k))
    total = add_over_ranks(layer, add, shape)
    return rows.new_zeros(shape) if total is None else total.to(rows.dtype)
