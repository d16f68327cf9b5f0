"""The order in which Marlin's kernel for experts reads the scales of gate and up projections."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from sglang.srt.layers.quantization.marlin_utils import marlin_moe_permute_scales


@contextlib.contextmanager
def gate_up_scales_in_order(layer: Any, group_size: int) -> Iterator[None]:
    """Put right how SGLang orders `w13_scales` while it repacks a layer in this context.

    Marlin reads the scales in one order where a column has several groups and in another where it
    has one. SGLang chooses by the inner features of a rank, which are the down projection's K; the
    gate and up projections' is the hidden size. Where a rank has no more inner features than a
    group, 128 say, their scales come out in the wrong order, and so do the layer's outputs.
    Source: SGLang 0.5.23, hardware_backend/gpu/quantization/{gptq_kernels.py:288,
    awq_kernels.py:203}; seen in the outputs of an H100.

    Args:
        layer: the experts, with `w13_scales` [E, K / G, 2N] as loaded.
        group_size: G; -1 for one group a column.
    """
    num_groups, size_n = layer.w13_scales.shape[1:]
    size_k = num_groups * group_size
    inner = layer.intermediate_size_per_partition
    if group_size == -1 or (group_size < inner) == (group_size < size_k):
        yield
        return
    loaded = layer.w13_scales.detach().clone()
    yield
    ordered = marlin_moe_permute_scales(loaded, size_k, size_n, group_size)
    layer.w13_scales.data.copy_(ordered)
