"""What the block formats of FP8 and INT8 share: scale grid and shape rules."""

from __future__ import annotations

from collections.abc import Sequence

from mixedprec_plugin.methods.partitions import inputs_per_rank, outputs_per_rank, per_rank
from mixedprec_plugin.methods.spec import LayerShape


def grid(N: int, K: int, block_size: Sequence[int]) -> tuple[int, int]:
    """Return the shape of the scales of an [N, K] weight: a partial block has a scale too."""
    block_n, block_k = block_size
    return -(-N // block_n), -(-K // block_k)


def block_faults(block_size: Sequence[int], shape: LayerShape) -> list[str]:
    """Return what SGLang's block methods refuse of a layer that its ranks divide.

    Source: `Fp8LinearMethod.validate_block_quant_shapes` (layers/quantization/fp8.py:570) and
    `BlockInt8LinearMethod.create_weights` (layers/quantization/blockwise_int8.py:162-178) refuse
    partial blocks where a partition or a shard would begin inside a block; a lone layer's last
    rows may be a partial block. Along K the quantization of activations asserts whole groups for
    every layer: per_token_group_quant_fp8 and sglang_per_token_group_quant_fp8
    (kernels/ops/quantization/fp8_kernel.py:252, 502), per_token_group_quant_int8
    (kernels/ops/quantization/int8_kernel.py:156). Of experts, the same holds: gate and up are two
    shards, and down's inputs are quantized in groups (fp8.py:1588, blockwise_int8.py:284).
    """
    block_n, block_k = block_size
    found = []
    K = inputs_per_rank(shape)
    if K % block_k:
        found.append(
            f"K = {K}{per_rank(shape, 'row')} is not a multiple of {block_k}, the block size"
            " along K and the group of its activations"
        )
    if len(shape.shard_sizes) > 1 or (shape.parallel == "column" and shape.tp_size > 1):
        sizes = outputs_per_rank(shape)
        # replicated shards are laid end to end in one layer: its last rows may be a partial block
        begun = sizes[:-1] if shape.parallel == "replicated" else sizes
        ragged = sorted({N for N in begun if N % block_n})
        owner = "a shard of its fused module" if len(shape.shard_sizes) > 1 else "the layer"
        found += [
            f"N = {N}{per_rank(shape, 'column')} of {owner} is not a multiple of {block_n},"
            " the block size along N"
            for N in ragged
        ]
    return found
