"""Experts of few bits, weight-only: every expert's weight stays packed in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from mixedprec_plugin.cpu.experts import Product, Rows, weigh
from mixedprec_plugin.cpu.int4 import Int4Weight
from mixedprec_plugin.cpu.int8 import Int8Weight

PackedWeight = Int4Weight | Int8Weight
Multiply = Callable[[int, torch.Tensor], torch.Tensor]


def prepare_weight_only(multiply: Multiply, is_early: bool, x: torch.Tensor) -> Product:
    """Make ready activations that are not quantized.

    Args:
        multiply: (expert, [t, K]) -> [t, N] in the dtype of the activations.
        is_early: whether the router weight multiplies the first product.
        x: [R, K].
    Returns:
        the product with an expert's weight. The router weight is rounded to the activation's dtype
        and multiplies the rounded product, as in the Marlin kernel (marlin_moe/marlin_template.h:
        582, 1719). On the first product Marlin has none, and Triton's kernel multiplies in float32.
    """

    def run(expert: int, rows: Rows, router_weights: torch.Tensor | None) -> torch.Tensor:
        product = multiply(expert, x[rows])
        if router_weights is None:
            return product
        if is_early:
            return weigh(product, router_weights, x.dtype)
        return product * router_weights.to(x.dtype).unsqueeze(1)

    return run


def pack_experts(
    qweight: torch.nn.Parameter,
    scales: torch.nn.Parameter,
    pack: Callable[[int], PackedWeight | None],
) -> list[PackedWeight] | None:
    """Replace the stored words of all experts by a layout that is fast here.

    Args:
        qweight: int32 [E, ...]; afterwards it holds the packed weights [E, N, K * bits / 8].
        scales: [E, K/G, N]; afterwards it may be a view of what the kernel reads.
        pack: expert -> its packed weight, None where the layout does not take the shape.
    Returns:
        every expert's weight, or None where nothing was changed.
    """
    num_experts = qweight.shape[0]
    first = pack(0)
    if first is None:
        return None
    packed = first.packed.new_empty(num_experts, *first.packed.shape)
    pairs = None
    if isinstance(first, Int4Weight):
        pairs = first.pairs.new_empty(num_experts, *first.pairs.shape)
    weights: list[PackedWeight] = []
    for expert in range(num_experts):
        weight = first if expert == 0 else pack(expert)
        assert weight is not None
        packed[expert].copy_(weight.packed)
        if isinstance(weight, Int4Weight):
            assert pairs is not None
            pairs[expert].copy_(weight.pairs)
            shares = weight.pairs.shape[0] == weight.scales.shape[0]
            weight = dataclasses.replace(
                weight,
                pairs=pairs[expert],
                scales=pairs[expert][..., 0] if shares else weight.scales,
            )
        weights.append(dataclasses.replace(weight, packed=packed[expert]))
    qweight.data = packed
    if pairs is not None and pairs.shape[1] == scales.shape[1]:
        scales.data = pairs[..., 0]
    return weights
