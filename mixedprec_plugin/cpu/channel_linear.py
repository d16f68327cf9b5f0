"""What linear methods with a scale a channel do: SGLang's weights, CUDA's arithmetic in torch."""

from __future__ import annotations

from functools import partial

import torch
from sglang.srt.layers.linear import LinearBase

from mixedprec_plugin.cpu.activation import quantize_fp8_static, quantize_fp8_tokens
from mixedprec_plugin.cpu.channel_matmul import add_products, scale_sums
from mixedprec_plugin.cpu.rank_sums import add_over_ranks, greatest_over_ranks


def multiply_channels(
    layer: LinearBase,
    weight: torch.Tensor,
    channel_scales: torch.Tensor,
    token_scale: torch.Tensor | None,
    rows: torch.Tensor,
) -> torch.Tensor:
    """Quantize activations to FP8 and multiply them by a layer's weight.

    Args:
        layer: whose K its ranks may share; then a token has one scale over all of them, and the
            product of all is on the last rank, zeros on the others.
        weight: float8_e4m3fn [N, K].
        channel_scales: float32 [N, 1].
        token_scale: the activations' static scale, float32 of one element; None: one a token.
        rows: [T, K].
    Returns:
        [T, N] in the dtype of rows.
    """
    if token_scale is None:
        codes, scales = quantize_fp8_tokens(rows, partial(greatest_over_ranks, layer))
    else:
        codes, scales = quantize_fp8_static(rows, token_scale), token_scale
    shape = (rows.shape[0], weight.shape[0])
    total = add_over_ranks(layer, partial(add_products, codes, weight), shape)
    if total is None:
        return rows.new_zeros(shape)
    return scale_sums(total, scales, channel_scales).to(rows.dtype)
