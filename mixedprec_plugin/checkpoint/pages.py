"""Pages of a range of memory, brought in at once and not one by one as touched, and let go."""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
from typing import Any

# linux/mman.h, from Linux 5.14 on
_MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 22, 23


def bring_in(address: int, num_bytes: int, *, to_write: bool = False) -> None:
    """Have the kernel map all pages of a range, reading them from their file where there is one.

    Args:
        address, num_bytes: the range; anywhere in its pages.
        to_write: whether it will be written to.
    Raises:
        OSError: a page cannot be read: an error here, and no SIGBUS where it is touched.
    """
    start = address - address % mmap.PAGESIZE
    advice = _MADV_POPULATE_WRITE if to_write else _MADV_POPULATE_READ
    libc = _libc()
    if libc.madvise(start, address + num_bytes - start, advice):
        number = ctypes.get_errno()
        # older kernels do not know it; pages come in as they are touched
        if number != errno.EINVAL:
            raise OSError(number, os.strerror(number))


def let_go(address: int, num_bytes: int) -> None:
    """Have a mapping of a file give its pages back to the page cache; what was written is lost.

    Args:
        address: the start of a page.
        num_bytes: of the range; its last page counts as a whole.
    Raises:
        OSError: the range is not mapped.
    """
    if _libc().madvise(address, num_bytes, mmap.MADV_DONTNEED):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@functools.cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return libc
