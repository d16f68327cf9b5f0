"""Experts with a scale a block, FP8 and INT8."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mixedprec_plugin.cpu.block_matmul import block_matmul
from mixedprec_plugin.cpu.experts import Product, Rows, weigh

Quantize = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


def prepare_blocks(
    quantize: Quantize,
    block_size: tuple[int, int],
    weights: torch.Tensor,
    weight_scales: torch.Tensor,
    x: torch.Tensor,
) -> Product:
    """Quantize activations by groups, ready for block-quantized experts.

    Args:
        quantize: ([R, K], group size) -> codes [R, K], scales [R, K/G].
        block_size: (BN, BK).
        weights: [E, N, K], the dtype of the codes.
        weight_scales: float32 [E, N/BN, K/BK].
        x: [R, K].
    Returns:
        the product with an expert's weight: summed in float32, times the router weight, rounded.
    """
    codes, scales = quantize(x, block_size[1])

    def multiply(expert: int, rows: Rows, router_weights: torch.Tensor | None) -> torch.Tensor:
        product = block_matmul(
            codes[rows],
            scales[rows],
            weights[expert],
            weight_scales[expert],
            block_size,
            torch.float32,
        )
        return weigh(product, router_weights, x.dtype)

    return multiply
