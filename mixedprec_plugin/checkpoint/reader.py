"""Reading tensors: exactly the bytes that are asked for, each once.

A large tensor is a private mapping of its own range of the file, brought in as a whole and gone
with the tensor: its bytes are copied once, from the page cache to the parameter. Pages of a mapping
count as the process's memory, as those of a buffer would. Small tensors are plain reads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, cast

import numpy as np
import numpy.typing as npt
import torch

from mixedprec_plugin.checkpoint.finite import check_finite
from mixedprec_plugin.checkpoint.headers import StoredTensor
from mixedprec_plugin.checkpoint.hub import fetch_if_missing
from mixedprec_plugin.checkpoint.pages import bring_in
from mixedprec_plugin.errors import CheckpointError, Problem

if TYPE_CHECKING:
    from typing_extensions import Buffer, Self

TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

# below, a mapping costs more than the copy that it saves
_MAPPED_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Reading:
    """How files are read.

    Attributes:
        may_map: whether large tensors may be mappings, and not reads into memory of their own.
        drops_cache: whether the kernel is told in the end that it need not keep the files' pages.
    """

    may_map: bool = True
    drops_cache: bool = False


AS_USUAL = Reading()


class Reader:
    """Reads tensors of safetensors files; keeps files open until it is closed.

    Several threads may read at once.

    Args:
        how: how files are read.
    Example:
        with Reader() as reader:
            weight = reader.read(source.tensors["lm_head.weight"])
    """

    def __init__(self, how: Reading = AS_USUAL) -> None:
        self._how = how
        self._descriptors: dict[Path, int] = {}
        self._opening: dict[Path, threading.Lock] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        while self._descriptors:
            _, descriptor = self._descriptors.popitem()
            if self._how.drops_cache:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)

    def read(self, tensor: StoredTensor) -> torch.Tensor:
        """Read one tensor into memory of its own.

        Returns:
            the tensor on the CPU, with the stored dtype and shape.
        Raises:
            CheckpointError: the file ends early or cannot be downloaded, or its dtype is none that
                torch has.
        """
        if tensor.dtype not in TORCH_DTYPES:
            raise CheckpointError(
                Problem(
                    str(tensor.path), f"{tensor.name!r} is {tensor.dtype}, which torch cannot hold"
                )
            )
        descriptor = self.descriptor(tensor.path)
        if self.is_mapped(tensor):
            mapped = map_file(descriptor, tensor)
            value = view_mapped(mapped, tensor, _first_page(tensor))
            with raising_unread(tensor):
                bring_in(value.data_ptr(), tensor.num_bytes)
            return value
        buffer = np.empty(tensor.num_bytes, dtype=np.uint8)
        read_into(buffer, descriptor, tensor)
        # one of no bytes has no stride to be viewed by
        value = torch.from_numpy(buffer) if buffer.size else torch.empty(0, dtype=torch.uint8)
        return value.view(TORCH_DTYPES[tensor.dtype]).view(tensor.shape)

    def is_mapped(self, tensor: StoredTensor) -> bool:
        """Whether a tensor is read as a mapping."""
        # a file written by hand may start its tensors anywhere
        return (
            self._how.may_map
            and tensor.dtype in TORCH_DTYPES
            and tensor.num_bytes >= _MAPPED_BYTES
            and tensor.start % TORCH_DTYPES[tensor.dtype].itemsize == 0
        )

    def read_finite(self, tensor: StoredTensor) -> torch.Tensor:
        """Read one tensor and see that all of its numbers are finite.

        Raises:
            CheckpointError: some are not; or as `read` does.
        """
        value = self.read(tensor)
        check_finite(tensor, value)
        return value

    def read_to_place(self, tensor: StoredTensor) -> torch.Tensor:
        """Read one tensor that goes into the model as it is stored; see `read_finite`."""
        return self.read_finite(tensor)

    def descriptor(self, path: Path) -> int:
        """Open a file, downloading it first where the cache has not got it; once.

        Raises:
            CheckpointError: it cannot be opened or downloaded.
        """
        with self._opening.setdefault(path, threading.Lock()):
            if path not in self._descriptors:
                fetch_if_missing(path)
                try:
                    self._descriptors[path] = os.open(path, os.O_RDONLY)
                except OSError as error:
                    raise CheckpointError(
                        Problem(
                            str(path),
                            f"cannot be read ({error.strerror})",
                            "it was there when the plan was made; download it again",
                            "file",
                        )
                    ) from error
        return self._descriptors[path]


def read_into(
    buffer: npt.NDArray[np.uint8], descriptor: int, tensor: StoredTensor, start: int = 0
) -> None:
    """Fill a buffer with bytes of a tensor.

    Args:
        descriptor: of the tensor's file.
        start: of the tensor's bytes, the first one to read.
    Raises:
        CheckpointError: the file ends early, or cannot be read.
    """
    view = memoryview(cast("Buffer", buffer))
    done = 0
    while done < buffer.size:
        with raising_unread(tensor):
            count = os.preadv(descriptor, [view[done:]], tensor.start + start + done)
        if count == 0:
            _raise_short(tensor)
        done += count


def view_mapped(mapped: mmap.mmap, tensor: StoredTensor, start: int = 0) -> torch.Tensor:
    """Take a tensor out of a mapping of its file; nothing is read yet.

    Args:
        mapped: of the file, from byte `start` on; it lives as long as the tensor.
        tensor: one that starts at a multiple of its element's size.
    Raises:
        CheckpointError: the mapping ends before the tensor.
    """
    offset = tensor.start - start
    if len(mapped) < offset + tensor.num_bytes:
        _raise_short(tensor)
    data = torch.frombuffer(mapped, dtype=torch.uint8, count=tensor.num_bytes, offset=offset)
    return data.view(TORCH_DTYPES[tensor.dtype]).view(tensor.shape)


def map_file(descriptor: int, tensor: StoredTensor, *, is_whole: bool = False) -> mmap.mmap:
    """Map a tensor's range of its file, from the start of its first page on, or all of it.

    What is written to is a copy of its own: nobody can change the file.

    Raises:
        CheckpointError: the file ends early, or cannot be mapped.
    """
    first = 0 if is_whole else _first_page(tensor)
    end = tensor.start + tensor.num_bytes
    size = os.fstat(descriptor).st_size
    if size < end:
        _raise_short(tensor)
    length = size if is_whole else end - first
    with raising_unread(tensor):
        return mmap.mmap(descriptor, length, access=mmap.ACCESS_COPY, offset=first)


def _first_page(tensor: StoredTensor) -> int:
    return tensor.start - tensor.start % mmap.ALLOCATIONGRANULARITY


@contextlib.contextmanager
def raising_unread(tensor: StoredTensor) -> Iterator[None]:
    """Turn what the system says of a read into an error that names the tensor."""
    try:
        yield
    except OSError as error:
        what = f"{tensor.name!r} cannot be read ({error.strerror})"
        remedy = "check the disk, and download the file again"
        raise CheckpointError(Problem(str(tensor.path), what, remedy, "file")) from error


def _raise_short(tensor: StoredTensor) -> NoReturn:
    raise CheckpointError(
        Problem(
            str(tensor.path),
            f"ends inside {tensor.name!r}",
            "it changed while it was read; download it again",
            "file",
        )
    )
