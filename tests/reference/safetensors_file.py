"""Read a safetensors file with numpy alone.

Source: the format's README (an 8-byte little-endian header length, a JSON header, the data).
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

_INTEGERS = {"I8": np.int8, "U8": np.uint8, "I32": np.int32, "I64": np.int64}


def decode_e4m3(codes: np.ndarray) -> np.ndarray:
    """Decode FP8 e4m3fn (uint8) to float32: sign, 4 exponent bits (bias 7), 3 mantissa bits.

    Source: Micikevicius et al., "FP8 Formats for Deep Learning", table 1: no infinities, and only
    S.1111.111 is NaN.
    """
    table = []
    for code in range(256):
        sign, exponent, mantissa = code >> 7, (code >> 3) & 15, code & 7
        if exponent == 0:
            value = mantissa / 8 * 2.0**-6
        else:
            value = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        if exponent == 15 and mantissa == 7:
            value = float("nan")
        table.append(-value if sign else value)
    return np.array(table, dtype=np.float32)[codes]


def decode_bf16(codes: np.ndarray) -> np.ndarray:
    """Decode bfloat16 (uint16) to float32: it is float32's upper half."""
    return (codes.astype(np.uint32) << 16).view(np.float32)


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Read every tensor of a file.

    Args:
        path: a safetensors file.
    Returns:
        Tensor name -> array; all floating dtypes as float32 (exact for F32 and below), integers as
        they are.
    Raises:
        ValueError: a dtype that is not known here.
    """
    data = path.read_bytes()
    (header_bytes,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + header_bytes])
    header.pop("__metadata__", None)
    body = data[8 + header_bytes :]
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        tensors[name] = _decode(body[start:end], entry["dtype"]).reshape(entry["shape"])
    return tensors


def _decode(raw: bytes, dtype: str) -> np.ndarray:
    if dtype in _INTEGERS:
        return np.frombuffer(raw, _INTEGERS[dtype])
    if dtype == "F8_E4M3":
        return decode_e4m3(np.frombuffer(raw, np.uint8))
    if dtype == "BF16":
        return decode_bf16(np.frombuffer(raw, np.uint16))
    if dtype in ("F16", "F32"):
        return np.frombuffer(raw, np.float16 if dtype == "F16" else np.float32).astype(np.float32)
    raise ValueError(f"dtype {dtype!r} is not known (expected F32, F16, BF16, F8_E4M3 or integers)")
