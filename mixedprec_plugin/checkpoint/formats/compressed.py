"""compressed-tensors' pack-quantized: integers packed along K, and other layouts of its name.

    weight_packed      I32 [N, K/(32/bits)] holding q + 2**(bits-1), low bits first
    weight_scale       [N, K/G]
    weight_shape       I64 [2]
    weight_zero_point  I32 [N/(32/bits), K/G], packed along N, or (older) I8 [N, K/G]
    weight_g_idx       I32 [K], where groups are in activation order

Its int-, float- and naive-quantized are 8-bit weights beside a scale: see `scaled`.
"""

from __future__ import annotations

from mixedprec_plugin.checkpoint.formats.promise import Promise
from mixedprec_plugin.checkpoint.formats.stored import (
    FLOAT_DTYPES,
    StoredFormat,
    Tensors,
    group_size_of,
    incomplete,
    unusable,
)

_LABEL = "pack-quantized"


def detect_pack_quantized(tensors: Tensors, promise: Promise) -> StoredFormat:
    """Tell how a layer with a `weight_packed` is stored."""
    packed, scale = tensors["weight_packed"], tensors.get("weight_scale")
    if "meta" in tensors:
        return unusable(tensors, "compressed-tensors marlin-24")
    if packed.dtype == "U8":
        name = "nvfp4" if "weight_global_scale" in tensors else "mxfp4"
        return unusable(tensors, f"compressed-tensors {name}-{_LABEL}")
    if scale is None:
        return incomplete(tensors, _LABEL, ["weight_scale"], _LABEL)
    if packed.dtype != "I32" or len(packed.shape) != 2 or scale.dtype not in FLOAT_DTYPES:
        return unusable(tensors, f"{_LABEL} {packed.dtype} with scales of {scale.dtype}")
    N, num_words = packed.shape
    bits = promise.facts.get("bits") if promise.family == _LABEL else None
    if bits is None:
        return unusable(tensors, f"{_LABEL} in bits that config.json does not tell", N)
    if bits not in (4, 8):
        return unusable(tensors, f"{_LABEL} {bits}-bit", N, family=_LABEL)
    K = num_words * 32 // bits
    if len(scale.shape) != 2 or scale.shape[0] != N:
        text = f"its weight_scale is {list(scale.shape)} (expected [{N}, groups])"
        return unusable(tensors, _LABEL, N, K, family=_LABEL, disagreements=(text,))
    group_size = group_size_of(K, scale.shape[1])
    if group_size is None:
        name = f"{_LABEL} {bits}-bit with {scale.shape[1]} groups that do not divide K = {K}"
        return unusable(tensors, name, N, K, family=_LABEL)
    return _pack_quantized(tensors, N, K, int(bits), group_size)


def _pack_quantized(tensors: Tensors, N: int, K: int, bits: int, group_size: int) -> StoredFormat:
    zeros, num_groups = tensors.get("weight_zero_point"), tensors["weight_scale"].shape[1]
    layouts = {("I32", (-(-N * bits // 32), num_groups)), ("I8", (N, num_groups))}
    if zeros is not None and (zeros.dtype, zeros.shape) not in layouts:
        text = f"its weight_zero_point is {zeros.dtype} {list(zeros.shape)}"
        return unusable(tensors, _LABEL, N, K, family=_LABEL, disagreements=(text,))
    notes = [
        "" if zeros is None else "asymmetric",
        "act order" if "weight_g_idx" in tensors else "",
    ]
    matrix = {"weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"}
    return StoredFormat(
        "",
        {},
        N,
        K,
        " ".join([f"{_LABEL} {bits}-bit group {group_size}", *filter(None, notes)]),
        family=_LABEL,
        facts={"group_size": group_size, "symmetric": zeros is None},
        suffixes=frozenset(matrix | {"input_scale", "input_zero_point"}) & frozenset(tensors),
        dequantizer="mixedprec_plugin.quantize.pack_quantized:dequantize",
        dequantizer_arguments={"bits": bits, "group_size": group_size},
    )
