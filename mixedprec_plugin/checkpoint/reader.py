"""Reading tensors: exactly the bytes that are asked for, each once.

A large tensor is a private mapping of its own range of the file, brought in as a whole and gone
with the tensor: its bytes are copied once, from the page cache to the parameter. Pages of a mapping
count as the process's memory, as those of a buffer would. Small tensors are plain reads.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, cast

import torch

from mixedprec_plugin.checkpoint.finite import check_finite
from mixedprec_plugin.checkpoint.headers import StoredTensor
from mixedprec_plugin.checkpoint.hub import fetch_if_missing
from mixedprec_plugin.errors import CheckpointError, Problem

if TYPE_CHECKING:
    from typing_extensions import Buffer

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
_MADV_POPULATE_READ = 22  # linux/mman.h, from Linux 5.14 on


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

    def __enter__(self) -> Reader:
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
        dtype = TORCH_DTYPES[tensor.dtype]
        descriptor = self.descriptor(tensor.path)
        # a file written by hand may start its tensors anywhere
        is_mapped = self._how.may_map and tensor.num_bytes >= _MAPPED_BYTES
        if not is_mapped or tensor.start % dtype.itemsize:
            data = _read(descriptor, tensor)
        else:
            data = _map(descriptor, tensor)
        return data.view(dtype).view(tensor.shape)

    def read_finite(self, tensor: StoredTensor) -> torch.Tensor:
        """Read one tensor and see that all of its numbers are finite.

        Raises:
            CheckpointError: some are not; or as `read` does.
        """
        value = self.read(tensor)
        check_finite(tensor, value)
        return value

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


def _read(descriptor: int, tensor: StoredTensor) -> torch.Tensor:
    buffer = torch.empty(tensor.num_bytes, dtype=torch.uint8)
    view = memoryview(cast("Buffer", buffer.numpy()))
    done = 0
    while done < tensor.num_bytes:
        with _reading(tensor):
            count = os.preadv(descriptor, [view[done:]], tensor.start + done)
        if count == 0:
            _raise_short(tensor)
        done += count
    return buffer


def _map(descriptor: int, tensor: StoredTensor) -> torch.Tensor:
    start = tensor.start - tensor.start % mmap.ALLOCATIONGRANULARITY
    ahead = tensor.start - start
    if os.fstat(descriptor).st_size < tensor.start + tensor.num_bytes:
        _raise_short(tensor)
    with _reading(tensor):
        # its own copy of what is written to, so that nobody can change the file
        mapped = mmap.mmap(
            descriptor, ahead + tensor.num_bytes, access=mmap.ACCESS_COPY, offset=start
        )
        data = torch.frombuffer(mapped, dtype=torch.uint8, count=tensor.num_bytes, offset=ahead)
        _bring_in(data.data_ptr() - ahead, len(mapped))
    return data


def _bring_in(address: int, num_bytes: int) -> None:
    """Have the kernel map all pages at once: an unreadable one is an error, and no SIGBUS."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if libc.madvise(address, num_bytes, _MADV_POPULATE_READ):
        number = ctypes.get_errno()
        # older kernels do not know it; pages come in as they are touched
        if number != errno.EINVAL:
            raise OSError(number, os.strerror(number))


@contextlib.contextmanager
def _reading(tensor: StoredTensor) -> Iterator[None]:
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
