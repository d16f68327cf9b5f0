"""One safetensors file, without torch: its header, by the safetensors library, and its bytes.

Bytes are plain reads: without torch the library gives none of the dtypes that numpy lacks.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from safetensors import SafetensorError, safe_open

from mixedprec_plugin.checkpoint.files import (
    MAX_BYTES,
    check_not_pointer,
    check_size,
    file_error,
    file_remedy,
    open_plain,
)
from mixedprec_plugin.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from typing_extensions import Buffer

# bits an element; https://github.com/huggingface/safetensors, `Dtype`
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip

# of these `reader` makes torch's dtypes; of the others torch has none, or `check_finite` does not
# know what is not a number
TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F16": "float16", "BF16": "bfloat16",
    "F32": "float32", "F64": "float64",
}  # fmt: skip

# of torch and numpy
_MAX_DIMENSIONS = 64
_LENGTHS = {int}
_MAX_NAME = 1024

CHANGED = "it changed while it was read; download it again"


class StoredTensor(NamedTuple):
    """Where a tensor lies.

    Attributes:
        name: tensor name as the file spells it.
        dtype: safetensors dtype name, such as `BF16`.
        start: offset of the first byte, counted from the end of the file's header.
        part_of: the tensor of the file that this one is a part of; None if it is whole.
        step: how many rows of the file lie between the first byte of one row and that of the next;
            more than 1 where rows of another part stand between, as gate and up of gpt-oss do.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    num_bytes: int
    part_of: StoredTensor | None = None
    step: int = 1

    def span_of(self, num_bytes: int) -> int:
        """How far some of its bytes, whole rows where `step` is not 1, reach in the file."""
        if self.step == 1 or not num_bytes:
            return num_bytes
        row = self.num_bytes // self.shape[0]
        return (num_bytes // row - 1) * self.step * row + row

    def without_gaps(self, span: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Of bytes as `span_of` counts them, from the start of a row on, those that are its own."""
        if self.step == 1 or not span.size:
            return span
        import numpy as np

        row = self.num_bytes // self.shape[0]
        num_rows = (len(span) // row - 1) // self.step + 1
        strides = (self.step * row, 1)
        rows: npt.NDArray[np.uint8] = np.ndarray((num_rows, row), np.uint8, span, strides=strides)
        return rows.reshape(-1)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read the header of one safetensors file.

    Returns:
        tensor name -> where it lies, in the order of the file.
    Raises:
        CheckpointError: the file is missing, truncated, or no safetensors file.
    """
    try:
        with open_plain(path) as file:
            start = file.read(8)
            data = file.read(min(int.from_bytes(start, "little"), MAX_BYTES))
            check_not_pointer(start + data[:64], path)
            check_size(data, path)
            size = os.fstat(file.fileno()).st_size
        if found := _plain_header(data, size - 8, path):
            return found
    except OSError:
        pass  # said below
    with open_tensors(path, "numpy") as tensors:
        pieces = ((name, tensors.get_slice(name)) for name in tensors.offset_keys())
        return lay_out(((name, x.get_dtype(), x.get_shape()) for name, x in pieces), path)


def _plain_header(data: bytes, num_bytes: int, path: Path) -> dict[str, StoredTensor]:
    """What a header says that is as the format demands; empty for any other.

    The library imports numpy, a fifth of a plan's time; what is wrong is its to say.

    Args:
        num_bytes: of header and tensors.
    """
    try:
        entries = json.loads(data.decode())
        # a key may stand there twice, or be spelled in escapes
        counts = [data.count(key) for key in (b'"dtype"', b'"shape"', b'"data_offsets"')]
        is_plain = b"\\" not in data and data.count(b'"__metadata__"') < 2
        notes = entries.pop("__metadata__", {}).values()
        is_plain = is_plain and counts == [len(entries)] * 3
        said = sorted((*x.pop("data_offsets"), name, x) for name, x in entries.items())
        found = lay_out(((name, x.pop("dtype"), x.pop("shape")) for _, _, name, x in said), path)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, CheckpointError):
        return {}
    laid = [(x.start, x.start + x.num_bytes, x.name) for x in found.values()]
    is_plain = is_plain and laid == [x[:3] for x in said] and not any(x[3] for x in said)
    is_plain = is_plain and all(type(end) is int for x in said for end in x[:2])
    is_plain = is_plain and all(isinstance(note, str) for note in notes)
    end = laid[-1][1] if laid else 0
    return found if is_plain and len(data) + end == num_bytes else {}


def open_tensors(path: Path, framework: str, remedy: str = "") -> safe_open:
    """Open a safetensors file; the library checks its header.

    Raises:
        CheckpointError: as `read_header` does.
    """
    try:
        # the library says of every file that it cannot open that there is none, and waits for pipes
        with open_plain(path):
            return safe_open(path, framework=framework)
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
        raise file_error(path, what, remedy or file_remedy(error)) from error
    except SafetensorError as error:
        remedy = remedy or "download the file again"
        if "unknown variant" in str(error):
            remedy = f"{remedy}, or install a release of safetensors that knows it"
        raise file_error(path, _refusal(path, error), remedy) from error


def lay_out(entries: Iterable[tuple[Any, Any, Any]], path: Path) -> dict[str, StoredTensor]:
    """Tell where tensors lie whose bytes follow each other without a gap, as the format demands.

    Args:
        entries: name, dtype and shape, in the order of the file; as a header has them, of any type.
    Raises:
        CheckpointError: a name is no text, a dtype or a shape is none, or a tensor ends within a
            byte.
    """
    tensors: dict[str, StoredTensor] = {}
    start = 0
    for name, dtype, shape in entries:
        if not name.isprintable() or len(name) > _MAX_NAME:
            what = f"names a tensor {name[:_MAX_NAME]!r} (expected {_MAX_NAME} printable characters"
            raise file_error(path, f"{what} at most)", remedy="")
        is_shape = isinstance(shape, list) and len(shape) <= _MAX_DIMENSIONS
        is_shape = is_shape and {*map(type, shape)} <= _LENGTHS
        if not is_shape or (shape and not 0 <= min(shape) <= max(shape) < 1 << 63):
            what = f"{name!r} does not span the bytes of its dtype and shape"
            limit = f"expected up to {_MAX_DIMENSIONS} lengths"
            raise file_error(path, f"its header is malformed: {what} {shape!r:.80} ({limit})")
        bits = DTYPE_BITS.get(dtype) if isinstance(dtype, str) else None
        num_bytes, rest = divmod(math.prod(shape) * (bits or 0), 8)
        if rest or not bits:
            what = f"{name!r} is {dtype!r:.80} {shape} (expected whole bytes of a known dtype)"
            raise file_error(path, what)
        tensors[name] = StoredTensor(name, dtype, tuple(shape), path, start, num_bytes)
        start += num_bytes
    return tensors


def unreadable(tensors: Iterable[StoredTensor]) -> list[str]:
    """Dtypes of some tensors that are none of torch's, each once."""
    return sorted({tensor.dtype for tensor in tensors if tensor.dtype not in TORCH_NAMES})


def _refusal(path: Path, error: SafetensorError) -> str:
    """The library's words, or by how much the file is too short or too long."""
    reason = str(error).removeprefix("Error while deserializing header: ")
    if "not fully covered" not in reason:
        return f"safetensors refuses its header ({repr(reason)[1:-1][:400]})"
    with open_plain(path) as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    size = path.stat().st_size
    end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    state = "truncated" if size < end else "longer than its header says"
    return f"it is {state}: {size:,} bytes (expected {end:,})"


def read_bytes(tensor: StoredTensor, start: int, num_bytes: int) -> npt.NDArray[np.uint8]:
    """Read some bytes of a tensor into memory of their own; `start` counts from its first.

    Where its `step` is not 1 both are whole rows.

    Raises:
        CheckpointError: the file cannot be read or ends early.
    """
    import numpy as np

    try:
        with open_plain(tensor.path) as file:
            header_bytes = 8 + int.from_bytes(file.read(8), "little")
            file.seek(header_bytes + tensor.start + start * tensor.step)
            data = np.empty(tensor.span_of(num_bytes), dtype=np.uint8)
            count = file.readinto(cast("Buffer", data))
    except (OSError, OverflowError) as error:
        # the length of a header that changed may be no place in a file
        what = f"{tensor.name!r} cannot be read ({getattr(error, 'strerror', error)})"
        remedy = "check the disk, and download the file again"
        raise file_error(tensor.path, what, remedy) from error
    if count < len(data):
        raise file_error(tensor.path, f"ends inside {tensor.name!r}", CHANGED)
    return tensor.without_gaps(data)
