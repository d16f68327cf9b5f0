"""What the linear methods of the CPU platform share: SGLang's weights, CUDA's arithmetic in torch.

On CUDA every rank of a row-parallel layer rounds its part of the product to the model's dtype
before the parts are added. Where activations are quantized, such a rounding turns over a code in
the next layer, and that turns over others, until the greedy tokens are not those of one rank. Here
the ranks add to one float32 sum, one after the other in the order of K, and round it once: as many
ranks as one likes give the bits of one, and a test of tokens tells a wrong partition from a
rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from sglang.srt.distributed.parallel_state import GroupCoordinator
from sglang.srt.layers.linear import LinearBase, RowParallelLinear
from sglang.srt.layers.quantization.base_config import LinearMethodBase

from mixedprec_plugin.cpu.scaled_matmul import add_blocks, add_products, scale_sums

Quantize = Callable[
    [torch.Tensor, Callable[[torch.Tensor], torch.Tensor]], tuple[torch.Tensor, torch.Tensor]
]


class QuantizedLinear(LinearMethodBase):
    """Makes a linear method of SGLang's one that quantizes activations and multiplies in torch.

    The method's class has the name of SGLang's: linear layers choose their weight loader by it
    (sglang/srt/layers/linear.py:140).
    """

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Leave the parameters as they were loaded, so that they can be loaded again."""

    def apply(
        self, layer: LinearBase, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Quantize activations [..., K] and multiply, [..., N] in their dtype; the bias is [N]."""
        return multiply_rows(partial(self.multiply, layer), x, bias)

    def multiply(self, layer: LinearBase, rows: torch.Tensor) -> torch.Tensor:
        """[T, K] -> [T, N] in the dtype of rows."""
        raise NotImplementedError


def multiply_rows(
    multiply: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Apply a product of rows to activations of any number of dimensions.

    Args:
        multiply: [T, K] -> [T, N] in the dtype of x.
        x: [..., K]; may hold no token.
        bias: [N] or None; added after the product has been rounded, as SGLang's CUDA paths do.
    Returns:
        [..., N] in the dtype of x.
    """
    out = multiply(x.reshape(-1, x.shape[-1]))
    out = out.view(*x.shape[:-1], out.shape[-1])
    return out if bias is None else out + bias


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


def multiply_channels(
    layer: LinearBase,
    quantize: Quantize,
    channel_scales: torch.Tensor,
    rows: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Quantize activations and multiply them by a layer's weight, a scale a channel.

    Args:
        layer: holds `weight` [N, K]. Its ranks may share K; then a token has one scale over all of
            them, and the product of all is on the last rank, zeros on the others.
        quantize: rows and `greatest`, as of `quantize_fp8_tokens` -> codes [T, K] of the weight's
            dtype, and scales float32, [T, 1] or one element.
        channel_scales: float32 [N, 1].
        bias: [N], added before the product is rounded; None where it is added afterwards.
    Returns:
        [T, N] in the dtype of rows.
    """
    codes, scales = quantize(rows, partial(_greatest_over_ranks, layer))
    weight = layer.weight.data
    shape = (rows.shape[0], weight.shape[0])
    total = add_over_ranks(layer, partial(add_products, codes, weight), shape)
    if total is None:
        return rows.new_zeros(shape) if bias is None else bias.expand(shape)
    product = scale_sums(total, codes.dtype, scales, channel_scales)
    return (product if bias is None else product + bias).to(rows.dtype)


def add_over_ranks(
    layer: LinearBase, add: Callable[[torch.Tensor], None], shape: tuple[int, int]
) -> torch.Tensor | None:
    """Add up a layer's product over the ranks that share its K.

    Args:
        layer: any linear layer; all but row-parallel ones hold the whole K.
        add: adds this rank's part to a sum, float32 [T, N], in place and in the order of K.
    Returns:
        the sum, float32 [T, N]; None where another rank holds it: the last one does. SGLang's
        all-reduce, to which the others give zeros, then hands it to all.
    """
    group = _ranks_of(layer)
    if group is None or not shape[0]:
        total = torch.zeros(shape, dtype=torch.float32)
        add(total)
        return total
    rank = group.rank_in_group
    if rank:
        total = group.recv(torch.Size(shape), torch.float32)
    else:
        total = torch.zeros(shape, dtype=torch.float32)
    add(total)
    if rank == group.world_size - 1:
        return total
    group.send(total)
    return None


def _greatest_over_ranks(layer: LinearBase, values: torch.Tensor) -> torch.Tensor:
    """The greatest of a number a token over the ranks that share a layer's K, [T, 1] -> [T, 1]."""
    group = _ranks_of(layer)
    if group is None or not values.numel():
        return values
    greatest: torch.Tensor = group.all_gather(values, dim=-1).amax(dim=-1, keepdim=True)
    return greatest


def _ranks_of(layer: LinearBase) -> GroupCoordinator | None:
    """The ranks that each hold a part of the layer's K; None where it is not split."""
    if not isinstance(layer, RowParallelLinear):
        return None
    # SGLang before 0.5.22 has none: there its own all-reduce adds up
    group = getattr(layer, "tp_group", None)
    is_split = isinstance(group, GroupCoordinator) and group.world_size > 1
    return group if is_split else None
