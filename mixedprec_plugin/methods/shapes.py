"""The shape rules that methods share: ranks, blocks, groups and Marlin's tiles.

Line numbers are SGLang 0.5.23's, below sglang/srt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mixedprec_plugin.methods.interface import Fault, LayerShape

MIN_THREAD_N = 64
MIN_THREAD_K = 128
EXPERT_N = 128
EXPERT_K = 64


def shape_faults(texts: Iterable[str]) -> list[Fault]:
    """Return a fault of the rule `shape` for each text."""
    return [Fault("shape", text) for text in texts]


def inputs_per_rank(shape: LayerShape) -> int:
    """Return the input features of one rank; exact only where `split_faults` finds nothing."""
    return shape.K // shape.tp_size if shape.parallel == "row" else shape.K


def outputs_per_rank(shape: LayerShape) -> tuple[int, ...]:
    """Return the output features of every shard of the fused module on one rank."""
    ranks = _shard_ranks(shape)
    return tuple(size // count for size, count in zip(shape.shard_sizes, ranks, strict=True))


def _shard_ranks(shape: LayerShape) -> tuple[int, ...]:
    """Over how many ranks each shard is split; 1 where the layer is not column-parallel."""
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
        for size, ranks in zip(shape.shard_sizes, _shard_ranks(shape), strict=True)
        if size % ranks
    }
    return [f"N = {size} does not split over {ranks} ranks" for size, ranks in sorted(uneven)]


def per_rank(shape: LayerShape, parallel: str) -> str:
    """Return " per rank" where the dimension that `parallel` splits is split, for messages."""
    return " per rank" if shape.tp_size > 1 and shape.parallel == parallel else ""


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
    why = "the block size along K and the group of its activations"
    found = input_faults(shape, block_k, why)
    if len(shape.shard_sizes) > 1 or (shape.parallel == "column" and shape.tp_size > 1):
        sizes = outputs_per_rank(shape)
        # replicated shards are laid end to end in one layer: its last rows may be a partial block
        begun = sizes[:-1] if shape.parallel == "replicated" else sizes
        owner = "a shard of its fused module" if len(shape.shard_sizes) > 1 else "the layer"
        where = f"{per_rank(shape, 'column')} of {owner}"
        found += _uneven_outputs(begun, where, block_n, "the block size along N")
    return found


def num_groups(K: int, group_size: int) -> int:
    """Return the groups along K; -1 makes one of them all, and a partial group counts."""
    return 1 if group_size == -1 else -(-K // group_size)


def group_size_of(K: int, count: int) -> int | None:
    """Return elements along K that share a scale, -1 for all of K; None where groups are ragged."""
    if count == 1:
        return -1
    return K // count if count and K and K % count == 0 else None


def group_faults(group_size: int, pack_N: int, pack_K: int, shape: LayerShape) -> list[str]:
    """Return where groups, or words of so many packed features, would be cut.

    Source: `AWQLinearScheme.create_weights` raises (awq/schemes/awq_linear.py:39-52);
    `GPTQMarlinLinearScheme.create_weights` rounds sizes down instead
    (gptq/schemes/gptq_marlin.py:86, 90, 113), so that stored tensors do not fit. The loaders of a
    fused module divide each shard's offset by the packed values (layers/parameter.py).
    """
    why, where = "the values packed in a word", per_rank(shape, "column")
    # of a head, the padded vocabulary is that of the ranks, and what is stored must fill words too
    sizes = (*outputs_per_rank(shape), *((shape.N,) if shape.is_head else ()))
    return [
        *_uneven_groups(shape, group_size),
        *input_faults(shape, pack_K, why),
        *_uneven_outputs(sizes, where, pack_N, why),
    ]


def marlin_faults(group_size: int, shape: LayerShape) -> list[str]:
    """Return what Marlin refuses of a layer that its ranks divide, shards of a module as one.

    Source: `verify_marlin_supports_shape` (layers/quantization/marlin_utils.py:40, 41, 161). The
    kernel for experts has other tiles: `thread_configs` and `is_valid_config`
    (kernels/jit/csrc/gemm/marlin_moe/moe_wna16_marlin.cuh:140, 265), and so says
    `check_moe_marlin_supports_layer` (marlin_utils.py:227).
    """
    unit_N, unit_K = (EXPERT_N, EXPERT_K) if shape.is_expert else (MIN_THREAD_N, MIN_THREAD_K)
    why = f"which Marlin kernels{' for experts' if shape.is_expert else ''} need"
    where = per_rank(shape, "column")
    if shape.is_expert and len(shape.shard_sizes) > 1:
        where += " of gate and up together"
    return [
        *_uneven_outputs([sum(outputs_per_rank(shape))], where, unit_N, why),
        *input_faults(shape, unit_K, why),
        *(_uneven_groups(shape, group_size) if group_size < shape.K else []),
    ]


def _uneven_outputs(sizes: Iterable[int], where: str, unit: int, why: str) -> list[str]:
    uneven = sorted({N for N in sizes if N % unit})
    return [f"N = {N}{where} is not a multiple of {unit}, {why}" for N in uneven]


def input_faults(shape: LayerShape, unit: int, why: str) -> list[str]:
    """Return where a rank's inputs are no multiple of a unit."""
    K, where = inputs_per_rank(shape), per_rank(shape, "row")
    return [f"K = {K}{where} is not a multiple of {unit}, {why}"] if K % unit else []


def output_faults(shape: LayerShape, unit: int, why: str, *, of_each: bool = False) -> list[str]:
    """Return where a rank's outputs, all shards together or each, are no multiple of a unit."""
    sizes = outputs_per_rank(shape) if of_each else [sum(outputs_per_rank(shape))]
    return _uneven_outputs(sizes, per_rank(shape, "column"), unit, why)


def _uneven_groups(shape: LayerShape, group_size: int) -> list[str]:
    K, where = inputs_per_rank(shape), per_rank(shape, "row")
    is_even = group_size == -1 or K % group_size == 0
    return [] if is_even else [f"group_size {group_size} does not divide K = {K}{where}"]


def fp8_marlin_fault(N: int, K: int) -> str:
    """Return why Marlin does not take an FP8 weight [N, K] of one rank; empty if it does.

    It serves FP8 on GPUs without FP8 arithmetic.

    Source: `tile_n_size` in gptq_marlin_repack.cuh and `thread_configs` in gptq_marlin.cuh
    (sglang/kernels/jit/csrc/gemm/marlin); nothing in Python asks (marlin_utils_fp8.py:98).
    """
    if any(N % n == 0 and K % k == 0 for n, k in ((64, 128), (128, 64))):
        return ""
    return (
        f"its share of a rank is [{N}, {K}], and FP8 runs in Marlin kernels on this GPU "
        "(expected multiples of [64, 128] or [128, 64])"
    )
