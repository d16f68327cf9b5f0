"""Adds up a row-parallel product over tensor-parallel ranks as one rank would add it up.

On CUDA every rank rounds its part of the product to the model's dtype before the parts are added.
Where activations are quantized, such a rounding turns over a code in the next layer, and that turns
over others, until the greedy tokens are not those of one rank. Here the ranks add to one float32
sum, one after the other in the order of K, and round it once: as many ranks as one likes give the
bits of one, and a test of tokens tells a wrong partition from a rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from sglang.srt.distributed.parallel_state import GroupCoordinator
from sglang.srt.layers.linear import LinearBase, RowParallelLinear


def add_over_ranks(
    layer: LinearBase, add: Callable[[torch.Tensor], None], shape: tuple[int, int]
) -> torch.Tensor | None:
    """Add up a layer's product over the ranks that share its K.

    Args:
        layer: any linear layer; all but row-parallel ones hold the whole K.
        add: adds this rank's part to a sum, float32 [T, N], in place and in the order of K.
        shape: (T, N).
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


def greatest_over_ranks(layer: LinearBase, values: torch.Tensor) -> torch.Tensor:
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
