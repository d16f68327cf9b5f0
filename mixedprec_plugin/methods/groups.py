"""What the integer formats with groups along K share: number of groups and divisibility."""

from __future__ import annotations

from mixedprec_plugin.methods.partitions import inputs_per_rank, outputs_per_rank, per_rank
from mixedprec_plugin.methods.spec import LayerShape


def num_groups(K: int, group_size: int) -> int:
    """Return the groups along K; -1 makes one of them all, and a partial group counts."""
    return 1 if group_size == -1 else -(-K // group_size)


def group_quality(group_size: int) -> float:
    """Return what a smaller group adds to a method's precision rank, below 0.1."""
    return 0.0 if group_size == -1 else 1 / group_size


def group_faults(group_size: int, pack_N: int, pack_K: int, shape: LayerShape) -> list[str]:
    """Return where groups or packed words would be cut.

    Args:
        group_size: input features that share a scale; -1 for all.
        pack_N: output features in one stored int32.
        pack_K: input features in one stored int32.
        shape: a layer that its ranks divide.

    Source: `AWQLinearScheme.create_weights` raises (awq/schemes/awq_linear.py:39-52);
    `GPTQMarlinLinearScheme.create_weights` rounds sizes down instead
    (gptq/schemes/gptq_marlin.py:86, 90, 113), so that stored tensors do not fit. The loaders of a
    fused module divide each shard's offset by the packed values (layers/parameter.py).
    """
    found = []
    K = inputs_per_rank(shape)
    where = per_rank(shape, "row")
    if group_size != -1 and K % group_size:
        found.append(f"group_size {group_size} does not divide K = {K}{where}")
    if K % pack_K:
        found.append(f"K = {K}{where} is not a multiple of {pack_K}, the values packed in a word")
    where = per_rank(shape, "column")
    found += [
        f"N = {N}{where} is not a multiple of {pack_N}, the values packed in a word"
        for N in sorted({N for N in outputs_per_rank(shape) if N % pack_N})
    ]
    return found
