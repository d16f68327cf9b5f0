"""The shapes that Marlin kernels take."""

from __future__ import annotations

from mixedprec_plugin.methods.partitions import inputs_per_rank, outputs_per_rank, per_rank
from mixedprec_plugin.methods.spec import LayerShape

MIN_THREAD_N = 64
MIN_THREAD_K = 128


def marlin_faults(group_size: int, shape: LayerShape) -> list[str]:
    """Return what Marlin refuses of a layer that its ranks divide.

    Args:
        group_size: input features that share a scale; -1 for all.
        shape: the layer; the shards of a fused module are one matrix for the kernel.

    Source: `verify_marlin_supports_shape` (layers/quantization/marlin_utils.py:40, 41, 161).
    """
    found = []
    N, K = sum(outputs_per_rank(shape)), inputs_per_rank(shape)
    if N % MIN_THREAD_N:
        where = per_rank(shape, "column")
        found.append(
            f"N = {N}{where} is not a multiple of {MIN_THREAD_N}, which Marlin kernels need"
        )
    where = per_rank(shape, "row")
    if K % MIN_THREAD_K:
        found.append(
            f"K = {K}{where} is not a multiple of {MIN_THREAD_K}, which Marlin kernels need"
        )
    if group_size < shape.K and K % group_size:
        found.append(f"group_size {group_size} does not divide K = {K}{where}")
    return found


def fp8_marlin_faults(shape: LayerShape) -> list[str]:
    """Return what Marlin refuses of an FP8 layer, which it serves on GPUs without FP8 arithmetic.

    Source: `tile_n_size` in gptq_marlin_repack.cuh and `thread_configs` in gptq_marlin.cuh
    (sglang/kernels/jit/csrc/gemm/marlin); nothing in Python asks (marlin_utils_fp8.py:98).
    """
    N, K = sum(outputs_per_rank(shape)), inputs_per_rank(shape)
    if any(N % n == 0 and K % k == 0 for n, k in ((64, 128), (128, 64))):
        return []
    return [
        f"its share of a rank is [{N}, {K}], and FP8 runs in Marlin kernels on this GPU "
        "(expected multiples of [64, 128] or [128, 64])"
    ]
