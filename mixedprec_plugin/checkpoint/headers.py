"""The header of a safetensors file, checked, without reading a weight."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from mixedprec_plugin.errors import CheckpointError, Problem

# bits an element; https://github.com/huggingface/safetensors, `Dtype`
DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
# the library refuses longer headers; so do we, before a corrupt length makes us read gigabytes
MAX_HEADER_BYTES = 100_000_000


class StoredTensor(NamedTuple):
    """Where a tensor lies.

    Attributes:
        name: tensor name as the file spells it.
        dtype: safetensors dtype name, such as `BF16`.
        shape: as stored.
        path: the file.
        start: offset of the first byte in the file.
        num_bytes: length.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    num_bytes: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read the header of one safetensors file.

    Returns:
        tensor name -> where it lies.
    Raises:
        CheckpointError: the file is missing, truncated, or no safetensors file.
    Source:
        https://github.com/huggingface/safetensors#format: 8 bytes little-endian header length,
        the JSON header, then the tensors' bytes, back to back.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            return parse_header(file, size, path)
    except OSError as error:
        raise CheckpointError(
            Problem(str(path), f"cannot be read ({error.strerror})", "download it again", "file")
        ) from error


def parse_header(file: BinaryIO, size: int, path: Path) -> dict[str, StoredTensor]:
    """Read the header of a safetensors file that is open at its beginning.

    Args:
        size: of the whole file, in bytes.
        path: where the file lies, or will.
    Returns:
        tensor name -> where it lies.
    Raises:
        CheckpointError: the file is truncated, or no safetensors file.
        OSError: it cannot be read.
    """
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
        raise _damaged(path, f"{size:,} bytes do not hold a safetensors header")
    try:
        header = json.loads(file.read(length))
    except ValueError as error:
        raise _damaged(path, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    tensors = {
        name: _stored_tensor(name, entry, path, data_start=8 + length)
        for name, entry in header.items()
    }
    end = max((t.start + t.num_bytes for t in tensors.values()), default=8 + length)
    if end != size:
        state = "truncated" if size < end else "longer than its header says"
        raise _damaged(path, f"it is {state}: {size:,} bytes (expected {end:,})")
    return tensors


def _stored_tensor(name: str, entry: Any, path: Path, data_start: int) -> StoredTensor:
    try:
        dtype, shape = str(entry["dtype"]), tuple(map(int, entry["shape"]))
        begin, end = map(int, entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"its entry for {name!r} is malformed") from error
    if dtype in DTYPE_BITS:
        num_bytes = math.prod(shape) * DTYPE_BITS[dtype] // 8
        if end - begin != num_bytes or begin < 0 or min(shape, default=0) < 0:
            raise _damaged(
                path,
                f"{name!r} spans {end - begin:,} bytes "
                f"(expected {num_bytes:,} for {dtype} {shape})",
            )
    return StoredTensor(name, dtype, shape, path, data_start + begin, end - begin)


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(Problem(str(path), what, "download the file again", "file"))
