"""The memory of tensors, and giving it back: glibc keeps what repacking frees, fragmented."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterable, Iterator

import torch

# malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LOADING_BYTES = 64 * 1024
# the largest that glibc would choose by itself: buffers of a forward pass are used again
_SERVING_BYTES = 32 * 1024 * 1024


@contextlib.contextmanager
def returning_memory() -> Iterator[None]:
    """Let freed tensors go back to the system at once, while the context lasts."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        yield
        return
    libc.mallopt(_M_MMAP_THRESHOLD, _LOADING_BYTES)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_THRESHOLD, _SERVING_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _SERVING_BYTES)
        trim_heap()


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors' memory, each piece once: tied weights share theirs."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def trim_heap() -> None:
    """Give the free pages of the heap back to the system."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
