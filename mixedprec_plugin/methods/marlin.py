"""The shapes that Marlin kernels take."""

from __future__ import annotations

from mixedprec_plugin.methods.partitions import inputs_per_rank, outputs_per_rank, per_rank
from mixedprec_plugin.methods.spec import LayerShape

MIN_THREAD_N = 64
MIN_THREAD_K = 128
EXPERT_N = 128
EXPERT_K = 64


def marlin_faults(group_size: int, shape: LayerShape) -> list[str]:
    """Return what Marlin refuses of a layer that its ranks divide.

    Args:
        group_size: input features that share a scale; -1 for all.
        shape: the layer; the shards of a fused module are one matrix for the kernel.

    Source: `verify_marlin_supports_shape` (layers/quantization/marlin_utils.py:40, 41, 161). The
    kernel for experts has other tiles: `thread_configs` and `is_valid_config`
    (kernels/jit/csrc/gemm/marlin_moe/moe_wna16_marlin.cuh:140, 265), and so says
    `check_moe_marlin_supports_layer` (marlin_utils.py:227).
    """
    found = []
    unit_N, unit_K = (EXPERT_N, EXPERT_K) if shape.is_expert else (MIN_THREAD_N, MIN_THREAD_K)
    kernels = "Marlin kernels for experts" if shape.is_expert else "Marlin kernels"
    N, K = sum(outputs_per_rank(shape)), inputs_per_rank(shape)
    if N % unit_N:
        where = per_rank(shape, "column")
        if shape.is_expert and len(shape.shard_sizes) > 1:
            where += " of gate and up together"
        found.append(f"N = {N}{where} is not a multiple of {unit_N}, which {kernels} need")
    where = per_rank(shape, "row")
    if K % unit_K:
        found.append(f"K = {K}{where} is not a multiple of {unit_K}, which {kernels} need")
    if group_size < shape.K and K % group_size:
        found.append(f"group_size {group_size} does not divide K = {K}{where}")
    return found


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


def fp8_marlin_faults(shape: LayerShape) -> list[str]:
    """Return what Marlin refuses of an FP8 layer; the shards of a fused module are one matrix."""
    fault = fp8_marlin_fault(sum(outputs_per_rank(shape)), inputs_per_rank(shape))
    return [fault] if fault else []
