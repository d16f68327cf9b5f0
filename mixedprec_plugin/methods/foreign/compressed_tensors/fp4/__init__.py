"""compressed-tensors' FP4: nvfp4-pack-quantized, and mxfp4-pack-quantized.

    weight_packed        U8 [N, K/2], two codes a byte
    weight_scale         F8_E4M3 [N, K/16]; of MXFP4 U8 [N, K/32], exponents that are biased by 127
    weight_global_scale  F32 [1]; W = q * weight_scale / weight_global_scale; of NVFP4 alone
    input_global_scale   F32 [1], where activations are quantized

Source: compressed-tensors `NVFP4PackedCompressor`, `MXFP4PackedCompressor`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from mixedprec_plugin.methods import mxfp4, nvfp4
from mixedprec_plugin.methods.interface import Fault, LayerShape, Target
from mixedprec_plugin.methods.stored import (
    Said,
    StoredFormat,
    Tensors,
    TensorSpec,
    incomplete,
    unusable,
)

PACKED, MX_PACKED = "nvfp4-pack-quantized", "mxfp4-pack-quantized"
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
    if scale is None:
        label = PACKED if _WHOLE in tensors else MX_PACKED
        return incomplete(tensors, label, [_SCALE], label)
    if _WHOLE not in tensors:
        return _recognize_mx(tensors)
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


def _recognize_mx(tensors: Tensors) -> StoredFormat:
    """Tell MXFP4, whose numbers are those of the method's own."""
    packed, scale = tensors["weight_packed"], tensors[_SCALE]
    found = mxfp4.recognize({"weight": packed, "weight_scale": scale}, Said())
    if found is None or "weight_zero_point" in tensors:
        text = f"{MX_PACKED} {list(packed.shape)} with {_SCALE} {scale.dtype} {list(scale.shape)}"
        zeros = " and weight_zero_point" if "weight_zero_point" in tensors else ""
        return unusable(tensors, text + zeros, encoding=MX_PACKED)
    return dataclasses.replace(
        found,
        method="",
        description=MX_PACKED,
        encoding=MX_PACKED,
        suffixes=frozenset({"weight_packed", _SCALE}),
        codec=CODEC,
    )


def faults(stored: StoredFormat, shape: LayerShape, target: Target) -> list[Fault]:
    """What SGLang's classes for such experts do not take; NVFP4's run in Marlin's kernels.

    MXFP4's has its parameters under other names, and where no backend is asked for dequantizes what
    they hold while it loads (compressed_tensors.py:242, mxfp4.py:1116).
    """
    if stored.encoding != MX_PACKED:
        return nvfp4.faults_as_stored(stored, shape, target)
    found = mxfp4.faults({}, shape, target)
    if found or target.device != "cuda":
        return found
    text = "SGLang's own class would dequantize them while it loads, and serve 16 bits"
    return [Fault("shape", text, f"write method: {mxfp4.NAME}")]


def why_not_written(stored: StoredFormat) -> str:
    """Say why SGLang does not read a layer of `nvfp4` or `mxfp4` in this form; empty if it does.

    Of MXFP4 only its models of Kimi K3 and DeepSeek V4 do. In others the experts' parameters have
    another name, and what is stored is skipped (compressed_tensors.py:236, models/qwen3_moe.py).
    Nor do they read the names of `mxfp4` itself: its config has no method for their linear layers,
    whatever it is told to leave out (mxfp4.py:338, 375). vLLM reads these, and SGLang would too, to
    serve experts that were never filled: so nothing is written.
    """
    is_mx = stored.facts["group_size"] == mxfp4.GROUP_SIZE
    text = "SGLang's models but Kimi K3's and DeepSeek V4's pass MXFP4 experts over there, unsaid"
    return text if is_mx else ""


def written(served: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """The tensors of a layer that `nvfp4` serves, in these names."""
    made = {name: served[own] for name, own in _NAMES.items() if own in served}
    return {name: spec._replace(shape=spec.shape or (1,)) for name, spec in made.items()}
