"""torchao's tensor subclasses, flattened: `_weight_qdata`, `_weight_scale`, `_weight_zero_point`.

The names do not tell the subclass; dtypes and shapes tell those that hold a code an element
(Float8Tensor, Int8Tensor, IntxUnpackedToInt8Tensor): W = (qdata - zero_point) * scale.
Source: pytorch/ao `flatten_tensor_state_dict` (torchao/prototype/safetensors).
"""

from __future__ import annotations

from mixedprec_plugin.methods import scaled
from mixedprec_plugin.methods.interface import Format
from mixedprec_plugin.methods.stored import (
    FLOAT_DTYPES,
    Said,
    StoredFormat,
    Tensors,
    incomplete,
    unusable,
)

_NAME = "torchao"
_PREFIX, _CODES = "_weight_", "_weight_qdata"
_SCALE, _ZEROS = "_weight_scale", "_weight_zero_point"
_LIMIT = 0.05


def recognize(tensors: Tensors, said: Said) -> StoredFormat | None:
    """Tell how a layer with a `_weight_qdata` is stored."""
    codes, scale, zeros = (tensors.get(suffix) for suffix in (_CODES, _SCALE, _ZEROS))
    if codes is None:
        return None
    if scale is None:
        return incomplete(tensors, _NAME, [_SCALE], _NAME)
    packed = f"torchao {codes.dtype} {list(codes.shape)}"
    own = sorted(suffix for suffix in tensors if suffix.startswith(_PREFIX))
    more = [suffix for suffix in own if suffix not in (_CODES, _SCALE, _ZEROS)]
    is_int4 = "Int4" in str(said.config.get("quant_type", ""))
    if len(codes.shape) != 2 or codes.dtype not in scaled.CODES or is_int4 or more:
        with_more = f" with {', '.join(more)}" if more else ""
        return unusable(tensors, packed + with_more, encoding=_NAME)
    grid = scaled.scale_grid(tensors, _SCALE, said, prefer_block=False, codes=_CODES)
    readable_zeros = zeros is None or (zeros.dtype == "I8" and zeros.shape == scale.shape)
    if scale.dtype not in FLOAT_DTYPES or grid is None or not readable_zeros:
        name = f"{packed} with scales {scale.dtype} {list(scale.shape)}"
        return unusable(tensors, name, encoding=_NAME)
    N, K = codes.shape
    return StoredFormat(
        "",
        {},
        N,
        K,
        f"torchao {scaled.CODES[codes.dtype][1]} {grid}",
        encoding=_NAME,
        numbers="scaled",
        facts={"strategy": grid.strategy},
        suffixes=frozenset(own),
        codec=scaled.CODEC,
        how={
            "codes": _CODES,
            "scale": _SCALE,
            "zero_point": _ZEROS,
            "block": list(grid.block),
            "reciprocal": False,
        },
        limit=_LIMIT,
    )


FORMAT = Format(name=_NAME, recognize=recognize)
