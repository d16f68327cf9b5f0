"""AWQ and GPTQ: `qweight`, `qzeros` and `scales`, told apart by the axis that words run along.

    AWQ    qweight I32 [K, N/8], qzeros I32 [K/G, N/8], scales [K/G, N]
    GPTQ   qweight I32 [K/P, N], qzeros I32 [K/G, N/P], scales [K/G, N], g_idx I32 [K]; P = 32/bits

The dtype of the scales says nothing. What headers cannot tell is GPTQ's zero convention (v1 stores
zero - 1, v2 the zero), whether zeros are all the middle of the range, and the order of groups.
"""

from __future__ import annotations

from typing import Any

from mixedprec_plugin.checkpoint.formats.promise import Promise
from mixedprec_plugin.checkpoint.formats.stored import (
    FLOAT_DTYPES,
    StoredFormat,
    Tensors,
    group_size_of,
    incomplete,
    unusable,
)

_V1_PACKINGS = frozenset({"", "gptq", "auto_round:auto_gptq"})
_V2_PACKINGS = frozenset({"gptq_v2"})
_READABLE_BITS = (4, 8)


def detect_packed(tensors: Tensors, promise: Promise) -> StoredFormat:
    """Tell how a layer with a `qweight` is stored."""
    missing = [suffix for suffix in ("scales", "qzeros") if suffix not in tensors]
    if missing:
        return incomplete(tensors, "a qweight", missing, promise.family or "")
    qweight, qzeros, scales = (tensors[suffix] for suffix in ("qweight", "qzeros", "scales"))
    version = str(promise.config.get("version") or "gemm").lower()
    if promise.family == "awq" and version != "gemm":
        return unusable(tensors, f"awq {version}", family="awq")
    matrices = all(len(tensor.shape) == 2 for tensor in (qweight, qzeros, scales))
    words = qweight.dtype == qzeros.dtype == "I32"
    if not matrices or not words or scales.dtype not in FLOAT_DTYPES:
        return unusable(tensors, f"a qweight of {qweight.dtype} with scales of {scales.dtype}")
    num_groups, N = scales.shape
    rows, columns = qweight.shape
    if columns * 8 == N and qzeros.shape == (num_groups, columns):
        return _awq(tensors, N, rows, num_groups)
    if columns == N and qzeros.shape[0] == num_groups and qzeros.shape[1]:
        return _gptq(tensors, promise, N, num_groups)
    return unusable(tensors, "a qweight in an unknown packing", N)


def _awq(tensors: Tensors, N: int, K: int, num_groups: int) -> StoredFormat:
    group_size = group_size_of(K, num_groups)
    if group_size is None:
        return unusable(tensors, _ragged("awq 4-bit", K, num_groups), N, K, family="awq")
    return StoredFormat(
        "awq",
        {"bits": 4, "group_size": group_size, "zero_point": True},
        N,
        K,
        f"awq 4-bit group {group_size}",
        family="awq",
        facts={"bits": 4, "group_size": group_size},
        suffixes=frozenset({"qweight", "qzeros", "scales"}),
        dequantizer="mixedprec_plugin.methods.awq.codec:dequantize",
        dequantizer_arguments={"group_size": group_size},
    )


def _gptq(tensors: Tensors, promise: Promise, N: int, num_groups: int) -> StoredFormat:
    bits, rest = divmod(32 * tensors["qzeros"].shape[1], N)
    packing = _packing(promise)
    K = tensors["qweight"].shape[0] * 32 // bits if bits else 0
    label = f"gptq {bits}-bit"
    group_size = group_size_of(K, num_groups)
    g_idx = tensors.get("g_idx")
    if rest or bits not in _READABLE_BITS:
        return unusable(tensors, label, N, K, family="gptq")
    if packing not in _V1_PACKINGS | _V2_PACKINGS:
        return unusable(tensors, f"{label} packed as {packing}", N, K, family="gptq")
    if group_size is None:
        return unusable(tensors, _ragged(label, K, num_groups), N, K, family="gptq")
    if g_idx is not None and g_idx.shape != (K,):
        text = f"its g_idx is {list(g_idx.shape)} (expected {[K]})"
        return unusable(tensors, label, N, K, family="gptq", disagreements=(text,))
    desc_act = bool(promise.facts.get("desc_act", False))
    if desc_act and g_idx is None:
        return incomplete(tensors, f"{label} with act order", ["g_idx"], "gptq")
    return _readable_gptq(tensors, promise, (N, K), bits, group_size)


def _readable_gptq(
    tensors: Tensors, promise: Promise, shape: tuple[int, int], bits: int, group_size: int
) -> StoredFormat:
    symmetric = bool(promise.facts.get("symmetric", True))
    desc_act = bool(promise.facts.get("desc_act", False))
    version = "gptq_v2" if _packing(promise) in _V2_PACKINGS else "gptq"
    notes = [
        "" if symmetric else "asymmetric",
        "act order" if desc_act else "",
        "v2" if version == "gptq_v2" else "",
        "" if "g_idx" in tensors else "without g_idx",
    ]
    is_served = symmetric and version == "gptq"
    arguments: dict[str, Any] = {
        "bits": bits, "group_size": group_size, "sym": True, "desc_act": desc_act
    }  # fmt: skip
    return StoredFormat(
        "gptq" if is_served else "",
        arguments if is_served else {},
        *shape,
        " ".join([f"gptq {bits}-bit group {group_size}", *filter(None, notes)]),
        family="gptq",
        facts={"bits": bits, "group_size": group_size},
        suffixes=frozenset({"qweight", "qzeros", "scales", "g_idx"}) & frozenset(tensors),
        dequantizer="mixedprec_plugin.methods.gptq.codec:dequantize",
        dequantizer_arguments={
            "bits": bits, "group_size": group_size, "checkpoint_format": version
        },
        filled=frozenset({"g_idx"}) - frozenset(tensors) if is_served else frozenset(),
    )  # fmt: skip


def _packing(promise: Promise) -> str:
    packing = promise.config.get("checkpoint_format") or promise.config.get("packing_format")
    return str(packing or "")


def _ragged(label: str, K: int, num_groups: int) -> str:
    return f"{label} with {num_groups} groups that do not divide K = {K}"
