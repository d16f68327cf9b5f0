"""Makes Triton's CPU interpreter round as a GPU does.

The stock interpreter is silently wrong in three places: float32 -> bfloat16 truncates, float32 ->
e4m3 mishandles carries and small values, and arithmetic on bfloat16 works on the bit patterns.
Here each conversion goes through torch, which rounds to nearest even, and bfloat16 operands are
widened to float32 first. CUDA's `roundf`, which it does not have, is made here. Import this after
setting TRITON_INTERPRET=1 and before any kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.language.extra.cuda import libdevice
from triton.runtime import interpreter

_DTYPES = {
    tl.float64: torch.float64,
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
_CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FP8_MAX = 448.0
_BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)
_stock = {
    name: getattr(interpreter.InterpreterBuilder, name)
    for name in ("cast_impl", "binary_op", "unary_op")
}
_stock_convert = interpreter._convert_float


def _convert(data: np.ndarray, source: Any, target: Any, rounding: Any = None) -> np.ndarray:
    """Round an array that carries `source` to `target`; to e4m3 it saturates."""
    if source not in _DTYPES or target not in _DTYPES:
        return _stock_convert(data, source, target, rounding)
    data = np.ascontiguousarray(data)
    carrier = _CARRIERS[data.itemsize]
    words = torch.from_numpy(data.view(f"int{data.itemsize * 8}").copy()).view(carrier)
    values = words.view(_DTYPES[source])
    if target == tl.float8e4nv:
        values = values.float().clamp(-_FP8_MAX, _FP8_MAX)
    values = values.to(_DTYPES[target]).contiguous()
    bits = values.view(_CARRIERS[values.element_size()]).numpy()
    return bits.view(interpreter._get_np_dtype(target))


def _widen(handle: Any) -> np.ndarray:
    """The values of a handle as float32 where it is bfloat16, else as they are."""
    if handle.dtype.scalar == tl.bfloat16:
        return _convert(handle.data, tl.bfloat16, tl.float32)
    return handle.data


def _handle(data: np.ndarray, dtype: Any) -> Any:
    """A handle; float32 results of bfloat16 operations are rounded."""
    if dtype == tl.bfloat16 and data.dtype != bool:
        data = _convert(data.astype(np.float32), tl.float32, tl.bfloat16)
    return interpreter.TensorHandle(data, dtype)


def _cast(self: Any, source: Any, target: Any) -> Any:
    from_type, to_type = source.dtype.scalar, target.scalar
    if tl.bfloat16 not in (from_type, to_type) or from_type == to_type:
        return _stock["cast_impl"](self, source, target)
    if to_type == tl.bfloat16:
        return _handle(np.asarray(source.data), tl.bfloat16)
    return interpreter.TensorHandle(
        _widen(source).astype(interpreter._get_np_dtype(target)), to_type
    )


def _binary(self: Any, left: Any, right: Any, operation: Callable[..., Any]) -> Any:
    if left.dtype.scalar != tl.bfloat16 or operation in _BITWISE:
        return _stock["binary_op"](self, left, right, operation)
    return _handle(operation(_widen(left), _widen(right)), tl.bfloat16)


def _unary(self: Any, operand: Any, operation: Callable[..., Any]) -> Any:
    if operand.dtype.scalar != tl.bfloat16:
        return _stock["unary_op"](self, operand, operation)
    return _handle(operation(_widen(operand)), tl.bfloat16)


def _dot(self: Any, left: Any, right: Any, total: Any, _precision: Any, _imprecise: Any) -> Any:
    """Multiply in float32, integers exactly: their sums of up to 1,024 products fit."""

    def values(handle: Any) -> np.ndarray:
        scalar = handle.dtype.scalar
        if scalar in _DTYPES and scalar != tl.float32:
            return _convert(handle.data, scalar, tl.float32)
        assert handle.data.shape[0] <= 1024
        return handle.data.astype(np.float32)

    product = np.matmul(values(left), values(right)).astype(total.data.dtype)
    return interpreter.TensorHandle(product + total.data, total.dtype.scalar)


def _roundf(x: tl.tensor) -> tl.tensor:
    """To the nearest integer, halves away from zero."""
    data = x.handle.data
    whole = np.trunc(data)
    away = whole + np.where(np.abs(data - whole) >= 0.5, np.copysign(1, data), 0)
    return tl.tensor(interpreter.TensorHandle(away.astype(data.dtype), x.handle.dtype), x.type)


def install() -> None:
    """Put the cures in place, for the whole process."""
    interpreter._convert_float = _convert
    builder = interpreter.InterpreterBuilder
    builder.cast_impl, builder.binary_op, builder.unary_op = _cast, _binary, _unary
    builder.create_dot = _dot
    libdevice.round = _roundf
