"""A layer's share on one tensor-parallel rank."""

from __future__ import annotations

from mixedprec_plugin.methods.spec import LayerShape


def inputs_per_rank(shape: LayerShape) -> int:
    """Return the input features of one rank; exact only where `split_faults` finds nothing."""
    return shape.K // shape.tp_size if shape.parallel == "row" else shape.K


def outputs_per_rank(shape: LayerShape) -> tuple[int, ...]:
    """Return the output features of every shard of the fused module on one rank."""
    ranks = shard_ranks(shape)
    return tuple(size // count for size, count in zip(shape.shard_sizes, ranks, strict=True))


def shard_ranks(shape: LayerShape) -> tuple[int, ...]:
    """Return over how many ranks each shard is split; 1 where the layer is not column-parallel."""
    if shape.parallel != "column":
        return (1,) * len(shape.shard_sizes)
    return shape.shard_ranks or (shape.tp_size,) * len(shape.shard_sizes)


def split_faults(shape: LayerShape) -> list[str]:
    """Return why the layer cannot be split over its ranks.

    Source: `divide` asserts divisibility (distributed/utils.py:68), called by
    `ColumnParallelLinear`, `MergedColumnParallelLinear` and `RowParallelLinear`
    (layers/linear.py:483, 488, 1139, 1611); `FusedMoE` asserts it of the intermediate size
    (layers/moe/fused_moe_triton/layer.py:427).
    """
    if shape.parallel == "row" and shape.K % shape.tp_size:
        return [f"K = {shape.K} does not split over {shape.tp_size} ranks"]
    uneven = {
        (size, ranks)
        for size, ranks in zip(shape.shard_sizes, shard_ranks(shape), strict=True)
        if size % ranks
    }
    return [f"N = {size} does not split over {ranks} ranks" for size, ranks in sorted(uneven)]


def per_rank(shape: LayerShape, parallel: str) -> str:
    """Return " per rank" where the dimension that `parallel` splits is split, for messages."""
    return " per rank" if shape.tp_size > 1 and shape.parallel == parallel else ""
