"""Which stored formats hold the same numbers as a scheme, and so are repacked without a rounding.

    integers in groups   GPTQ v1 and v2, AWQ, compressed-tensors' pack-quantized, auto-round's
                         packings: all store codes, zero points and scales of W = (q - zero) * scale
    8-bit beside scales  FP8 per tensor, channel and block, INT8 in blocks, under other tools' names
    one FP8 scale        as a scale for each channel, all of them alike

Decided from headers and config.json. What only the values tell (zero points that are all the middle
of the range, a g_idx that is in order) is checked when they are read, see `compose.repack`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mixedprec_plugin.checkpoint.formats import StoredFormat
from mixedprec_plugin.checkpoint.headers import StoredTensor
from mixedprec_plugin.preset.model import Scheme

_INTEGERS = frozenset({"awq", "gptq", "pack-quantized"})
_CODES = {"fp8": "F8_E4M3", "fp8_channel": "F8_E4M3", "blockwise_int8": "I8"}


def is_repackable(
    stored: StoredFormat, scheme: Scheme, tensors: Mapping[str, StoredTensor]
) -> bool:
    """Whether a scheme's tensors can hold exactly the numbers of a layer stored otherwise.

    Args:
        tensors: parameter suffix -> stored tensor.
    """
    if not stored.dequantizer:
        return False
    if scheme.method in ("awq", "gptq") and stored.family in _INTEGERS:
        return not why_not_integers(stored, scheme)
    if scheme.method in _CODES and "weight" in tensors and "weight" in stored.suffixes:
        return _are_same_scales(stored, scheme, tensors)
    return False


def why_not_integers(stored: StoredFormat, scheme: Scheme) -> str:
    """Say why integers in groups cannot be those of `awq` or `gptq`; empty if they can, or are not.

    Where neither headers nor config.json tell whether zero points are all the middle, they may be,
    unless the preset allows a second rounding, which is right whatever they are.
    """
    if scheme.method not in ("awq", "gptq") or stored.family not in _INTEGERS:
        return ""
    if not stored.dequantizer:
        return f"this release does not read {stored.description}"
    arguments, K = scheme.arguments, stored.K
    bits = stored.dequantizer_arguments.get("bits", 4)
    if bits != arguments["bits"]:
        return f"it has {bits} bits"
    groups = [K if size == -1 else size for size in (_group_size(stored), arguments["group_size"])]
    if groups[0] != groups[1]:
        return f"it has groups of {_group_size(stored)}"
    if stored.N % (32 // bits) or K % (32 // bits):
        return f"[{stored.N}, {K}] does not fill whole words"
    if stored.said.get("desc_act") and not (scheme.method == stored.family == "gptq"):
        return "its groups are in act order"
    if scheme.method == "gptq":
        return _why_not_symmetric(stored, scheme)
    return ""


def _why_not_symmetric(stored: StoredFormat, scheme: Scheme) -> str:
    asks_for_order = scheme.arguments["desc_act"]
    has_order = stored.family == "gptq" and bool(stored.said.get("desc_act"))
    if asks_for_order and not has_order:
        return "its groups are in no act order"
    symmetric = is_symmetric(stored)
    if symmetric is False:
        return "it is asymmetric, and gptq is served symmetric only"
    if symmetric is None and scheme.requantize:
        return "nothing tells that it is symmetric"
    return ""


def is_symmetric(stored: StoredFormat) -> bool | None:
    """Whether integers in groups have the middle of the range as their only zero point.

    Returns:
        None where neither the tensors' names nor config.json tell.
    """
    if "symmetric" in stored.facts:
        return bool(stored.facts["symmetric"])
    told = stored.said.get("symmetric")
    if told is None and stored.family == "gptq":
        return True
    return told


def rounds_scales(scheme: Scheme, tensors: Mapping[str, StoredTensor], dtype: str) -> str:
    """Name the dtype of stored scales that the running dtype may not hold; empty if it holds all.

    The kernels of `awq` and `gptq` multiply by scales in the dtype that the model runs in.
    """
    if scheme.method not in ("awq", "gptq"):
        return ""
    scale = tensors.get("scales") or tensors.get("weight_scale")
    return scale.dtype if scale is not None and dtype == "BF16" and scale.dtype != dtype else ""


def _group_size(stored: StoredFormat) -> int:
    return int(stored.dequantizer_arguments["group_size"])


def _are_same_scales(
    stored: StoredFormat, scheme: Scheme, tensors: Mapping[str, StoredTensor]
) -> bool:
    how, asked = stored.dequantizer_arguments, scheme.arguments
    zeros = how.get("zero_point")
    if how.get("reciprocal") or (zeros is not None and zeros in tensors):
        return False
    if how.get("codes") != "weight" or tensors["weight"].dtype != _CODES[scheme.method]:
        return False
    static = "input_scale" in tensors
    if scheme.method == "fp8_channel":
        return not static and stored.facts.get("strategy") in ("tensor", "channel")
    if asked["activation_scheme"] != ("static" if static else "dynamic"):
        return False
    if static and math.prod(tensors["input_scale"].shape) != 1:
        return False
    if asked["weight_block_size"] is None:
        return bool(stored.facts.get("strategy") == "tensor")
    if stored.facts.get("strategy") != "block" or list(how["block"]) != asked["weight_block_size"]:
        return False
    # a layer whose activations are quantized otherwise, or not at all, would compute other numbers
    inputs: Mapping[str, Any] = stored.said.get("inputs") or {}
    return bool(inputs.get("dynamic")) and inputs.get("group_size") == how["block"][1]
