"""compressed-tensors' nvfp4-pack-quantized: NVFP4 with reciprocal scales of the whole.

    weight_packed        U8 [N, K/2], two codes a byte
    weight_scale         F8_E4M3 [N, K/16]
    weight_global_scale  F32 [1]; W = q * weight_scale / weight_global_scale
    input_global_scale   F32 [1], where activations are quantized

Source: compressed-tensors `NVFP4PackedCompressor`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from mixedprec_plugin.methods import nvfp4
from mixedprec_plugin.methods.interface import AS_STORED_REMEDY, Fault, LayerShape, Target
from mixedprec_plugin.methods.stored import (
    StoredFormat,
    Tensors,
    TensorSpec,
    incomplete,
    unusable,
)

PACKED = "nvfp4-pack-quantized"
CODEC = "mixedprec_plugin.methods.foreign.compressed_tensors.fp4.codec"
# of `QuantizationArgs`, as SGLang looks for them (compressed_tensors.py:589, 618)
BLOCKS = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": nvfp4.GROUP_SIZE,
}
INPUTS = {"dynamic": "local"}

_SCALE, _WHOLE, _INPUTS = "weight_scale", "weight_global_scale", "input_global_scale"
# name there -> as ModelOpt has it
_NAMES = {
    "weight_packed": "weight",
    _SCALE: "weight_scale",
    _WHOLE: "weight_scale_2",
    _INPUTS: "input_scale",
}


def recognize(tensors: Tensors) -> StoredFormat:
    """Tell how a layer is stored whose `weight_packed` is bytes."""
    packed, scale = tensors["weight_packed"], tensors.get(_SCALE)
    if _WHOLE not in tensors:
        return unusable(tensors, "compressed-tensors mxfp4-pack-quantized")
    if scale is None:
        return incomplete(tensors, PACKED, [_SCALE], PACKED)
    if len(packed.shape) != 2:
        return unusable(tensors, f"{PACKED} with weight_packed {list(packed.shape)}")
    N, K = packed.shape[0], 2 * packed.shape[1]
    wholes = [tensors[suffix] for suffix in (_WHOLE, _INPUTS) if suffix in tensors]
    is_one = all(math.prod(tensor.shape) == 1 for tensor in wholes)
    is_blocks = scale.shape == (N, K // nvfp4.GROUP_SIZE) and K % nvfp4.GROUP_SIZE == 0
    if not (is_one and is_blocks and scale.dtype == "F8_E4M3"):
        text = f"{PACKED} with {_SCALE} {scale.dtype} {list(scale.shape)}"
        return unusable(tensors, text, N, K, encoding=PACKED)
    has_inputs = _INPUTS in tensors
    return StoredFormat(
        "",
        {},
        N,
        K,
        f"{PACKED} with input scales" if has_inputs else PACKED,
        encoding=PACKED,
        numbers="fp4",
        facts={"group_size": nvfp4.GROUP_SIZE},
        suffixes=frozenset(_NAMES.keys() & tensors.keys()),
        codec=CODEC,
        like=nvfp4.NAME,
        limit=nvfp4.LIMIT,
    )


def faults(stored: StoredFormat, shape: LayerShape, target: Target) -> list[Fault]:
    """What SGLang's class for such experts, which run in Marlin's kernels, does not take."""
    found = nvfp4.faults_as_stored(stored, shape, target)
    return [fault._replace(remedy=fault.remedy or AS_STORED_REMEDY) for fault in found]


def written(served: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """The tensors of a layer that `nvfp4` serves, in these names."""
    made = {name: served[own] for name, own in _NAMES.items() if own in served}
    return {name: spec._replace(shape=spec.shape or (1,)) for name, spec in made.items()}
