"""torchao's tensor subclasses, flattened: `_weight_qdata`, `_weight_scale`, `_weight_zero_point`.

The names do not tell the subclass; dtypes and shapes tell those that hold a code an element
(Float8Tensor, Int8Tensor, IntxUnpackedToInt8Tensor): W = (qdata - zero_point) * scale.
Source: pytorch/ao `flatten_tensor_state_dict` (torchao/prototype/safetensors).
"""

from __future__ import annotations

from mixedprec_plugin.checkpoint.formats.promise import Promise
from mixedprec_plugin.checkpoint.formats.scaled import CODE_DTYPES, scale_grid
from mixedprec_plugin.checkpoint.formats.stored import (
    FLOAT_DTYPES,
    StoredFormat,
    Tensors,
    incomplete,
    unusable,
)

QDATA = "_weight_qdata"
_PREFIX, _SCALE, _ZEROS = "_weight_", "_weight_scale", "_weight_zero_point"


def detect_torchao(tensors: Tensors, promise: Promise) -> StoredFormat:
    """Tell how a layer with a `_weight_qdata` is stored."""
    codes, scale, zeros = (tensors.get(suffix) for suffix in (QDATA, _SCALE, _ZEROS))
    assert codes is not None
    if scale is None:
        return incomplete(tensors, "torchao", [_SCALE], "torchao")
    packed = f"torchao {codes.dtype} {list(codes.shape)}"
    more = sorted(s for s in tensors if s.startswith(_PREFIX) and s not in (QDATA, _SCALE, _ZEROS))
    is_int4 = "Int4" in str(promise.config.get("quant_type", ""))
    if len(codes.shape) != 2 or codes.dtype not in CODE_DTYPES or is_int4 or more:
        with_more = f" with {', '.join(more)}" if more else ""
        return unusable(tensors, packed + with_more, family="torchao")
    grid = scale_grid(tensors, _SCALE, promise, prefer_block=False, codes=QDATA)
    readable_zeros = zeros is None or (zeros.dtype == "I8" and zeros.shape == scale.shape)
    if scale.dtype not in FLOAT_DTYPES or grid is None or not readable_zeros:
        name = f"{packed} with scales {scale.dtype} {list(scale.shape)}"
        return unusable(tensors, name, family="torchao")
    N, K = codes.shape
    return StoredFormat(
        "",
        {},
        N,
        K,
        f"torchao {CODE_DTYPES[codes.dtype][1]} {grid}",
        family="torchao",
        facts={"strategy": grid.strategy},
        suffixes=frozenset(s for s in tensors if s.startswith(_PREFIX)),
        dequantizer="mixedprec_plugin.quantize.scaled:dequantize",
        dequantizer_arguments={
            "codes": QDATA, "scale": _SCALE, "zero_point": _ZEROS,
            "block": list(grid.block), "reciprocal": False,
        },
    )  # fmt: skip
