"""What is lost where a layer is rounded a second time, or its scales are.

The size of a rounding is told from the formats alone, for weights that are normally distributed;
those of real models come close to it, larger outliers make it larger.
"""

from __future__ import annotations

from collections.abc import Sequence

from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.methods.registry import METHODS
from mixedprec_plugin.plan.model import PlannedLayer

_DTYPES = {"F16": "float16", "F32": "float32"}


def find_losses(layer: PlannedLayer, target: Target) -> list[tuple[str, str]]:
    """Return (text, remedy) for what a layer's plan loses beside its one rounding."""
    scheme, stored = layer.scheme, layer.stored
    if scheme is None or stored is None:
        return []
    if layer.action == "requantize":
        error = METHODS[scheme.method].rounding(scheme.arguments).error(stored.N, stored.K)
        size = f"about {error:.1%} of the weights' RMS" if error else "its own"
        text = (
            f"is rounded twice: what {stored.description} lost stays lost, and {scheme.label} adds "
            f"an error of {size}"
        )
        return [(text, "take it from an unquantized source for one rounding")]
    # kernels of integers in groups multiply by scales in the dtype that the model runs in
    scale = layer.inputs.get("scales") or layer.inputs.get("weight_scale")
    is_rounded = (
        layer.action in ("repack", "as stored") and stored.numbers == "integers"
        and target.dtype == "BF16" and scale is not None and scale.dtype != target.dtype
    )  # fmt: skip
    if not is_rounded or scale is None:
        return []
    name = _DTYPES[scale.dtype]
    text = f"its codes are kept, its {name} scales are rounded to bfloat16, up to 0.2% each"
    return [(text, "start with --dtype float16 to keep them" if scale.dtype == "F16" else "")]


def find_shard_losses(layers: Sequence[PlannedLayer], target: Target) -> list[tuple[str, str]]:
    """Return (text, remedy) for what a fused module loses whose shards are of several sources.

    Source: `Fp8LinearMethod.process_weights_after_loading` (layers/quantization/fp8.py:1200-1249).
    """
    scales = [layer.outputs.get("weight_scale") for layer in layers]
    per_tensor = all(scale is not None and not scale.shape for scale in scales)
    if target.device != "cuda" or not per_tensor or len({layer.source for layer in layers}) < 2:
        return []
    text = (
        "its shards are of several sources, each with its own scale; on compute capability 12.x "
        "SGLang rounds them all again, to the largest scale"
    )
    return [(text, "use method: fp8_channel there")]
