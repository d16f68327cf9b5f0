"""What is lost where a layer is rounded a second time, or its scales are.

The size of a rounding is told from the formats alone, for weights that are normally distributed;
those of real models come close to it, larger outliers make it larger.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

from mixedprec_plugin.plan.auto import AUTO
from mixedprec_plugin.plan.model import PlannedLayer, Target
from mixedprec_plugin.plan.repacking import rounds_scales

_NORMAL = NormalDist()
# measured on half a million normal numbers; with three bits of mantissa it hardly depends on scales
_E4M3_RMS = 0.026
# formats whose scales SGLang's classes keep in the dtype that the model runs in
_RUNNING_SCALES = frozenset({"awq", "gptq", "pack-quantized"})
_DTYPES = {"F16": "float16", "F32": "float32"}


def find_losses(layer: PlannedLayer, target: Target) -> list[tuple[str, str]]:
    """Return (text, remedy) for what a layer's plan loses beside its one rounding."""
    scheme, stored = layer.scheme, layer.stored
    if scheme is None or stored is None:
        return []
    if layer.action == "requantize":
        error = relative_rms(scheme.method, scheme.arguments, stored.N, stored.K)
        size = f"about {error:.1%} of the weights' RMS" if error else "its own"
        text = (
            f"is rounded twice: what {stored.description} lost stays lost, and {scheme.label} adds "
            f"an error of {size}"
        )
        return [(text, "take it from an unquantized source for one rounding")]
    if layer.action in ("repack", "as stored") and (dtype := _rounded_scales(layer, target)):
        name = _DTYPES[dtype]
        text = f"its codes are kept, its {name} scales are rounded to bfloat16, up to 0.2% each"
        return [(text, "start with --dtype float16 to keep them" if dtype == "F16" else "")]
    return []


def _rounded_scales(layer: PlannedLayer, target: Target) -> str:
    """The dtype of scales that are rounded, by us or by SGLang's own loader; empty if none are."""
    assert layer.scheme is not None
    assert layer.stored is not None
    if layer.method == AUTO and layer.stored.family not in _RUNNING_SCALES:
        return ""
    scheme = layer.scheme
    if layer.method == AUTO:
        scheme = dataclasses.replace(scheme, method="gptq")
    return rounds_scales(scheme, layer.inputs, target.dtype)


def find_shard_losses(layers: Sequence[PlannedLayer], target: Target) -> list[tuple[str, str]]:
    """Return (text, remedy) for what a fused module loses whose shards are of several sources.

    Source: `Fp8LinearMethod.process_weights_after_loading` (layers/quantization/fp8.py:1200-1249).
    """
    per_tensor = all(
        layer.scheme is not None
        and layer.method == "fp8"
        and layer.scheme.arguments["weight_block_size"] is None
        for layer in layers
    )
    if target.device != "cuda" or not per_tensor or len({layer.source for layer in layers}) < 2:
        return []
    text = (
        "its shards are of several sources, each with its own scale; on compute capability 12.x "
        "SGLang rounds them all again, to the largest scale"
    )
    return [(text, "use method: fp8_channel there")]


def relative_rms(method: str, arguments: Mapping[str, Any], N: int, K: int) -> float:
    """Relative RMS error of rounding a normally distributed [N, K] weight to a method's codes.

    A group's step is the range that its largest weights span, over the number of codes; the error
    is uniform within a step, so its RMS is step / sqrt(12).

    Returns:
        0 for methods that are not known here.
    """
    if method in ("fp8", "fp8_channel"):
        return _E4M3_RMS
    if method == "blockwise_int8":
        block_n, block_k = arguments["weight_block_size"]
        step = _largest(min(N, block_n) * min(K, block_k)) / 127
    elif method in ("awq", "gptq"):
        bits, size = arguments["bits"], arguments["group_size"]
        group = K if size == -1 else size
        is_symmetric = method == "gptq"
        # `quantize.rounding`: symmetric codes reach half a step beyond half of the range
        step = (
            _largest(group) / ((1 << (bits - 1)) + 0.5)
            if is_symmetric
            else 2 * _NORMAL.inv_cdf(0.5 ** (1 / group)) / ((1 << bits) - 1)
        )
    else:
        return 0.0
    return step / math.sqrt(12)


def _largest(count: int) -> float:
    """Median of the largest magnitude among standard normal numbers."""
    return _NORMAL.inv_cdf((1 + 0.5 ** (1 / count)) / 2)
