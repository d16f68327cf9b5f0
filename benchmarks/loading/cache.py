"""The page cache: put files out of it and into it, and see that they are."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

# what other processes may have brought in between
_COLD_SHARE, _WARM_SHARE = 0.01, 0.99


class CacheError(Exception):
    """Files are not where they should be."""


def make_cold(paths: Iterable[Path]) -> None:
    """Put files out of the page cache.

    Raises:
        CacheError: the kernel kept some; another process may have them mapped.
    """
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # pages that are not on disk yet stay
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
        if (share := resident_share(path)) > _COLD_SHARE:
            raise CacheError(f"{path}: {share:.0%} are in the page cache, not none")


def make_warm(paths: Iterable[Path]) -> None:
    """Read files into the page cache.

    Raises:
        CacheError: they did not stay; memory is short.
    """
    paths = list(paths)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass
    for path in paths:
        if (share := resident_share(path)) < _WARM_SHARE:
            raise CacheError(f"{path}: {share:.0%} are in the page cache, not all")


def resident_share(path: Path) -> float:
    """Tell how much of a file is in the page cache, by mincore(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    size = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as mapped:
        view = np.frombuffer(mapped, dtype=np.uint8)
        pages = np.zeros(-(-size // mmap.PAGESIZE), dtype=np.uint8)
        failed = libc.mincore(view.ctypes.data, size, pages.ctypes.data)
        del view  # or the mapping cannot be closed
    if failed:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
    return float((pages & 1).mean())
