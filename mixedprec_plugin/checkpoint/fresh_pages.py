"""Filling memory that nobody has touched yet, without the zeros that the kernel would write first.

A fresh page is zeroed as it is brought in, and then written a second time by whoever wanted it.
userfaultfd(2) hands out pages that are copies of others from the start: UFFDIO_COPY takes about two
thirds of the time of both. Registered pages that are still missing must not be touched by anyone,
who would wait for ever; so each range is registered while it is filled, and no longer.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import platform
import struct
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

# the C library has no function for it; numbers of asm/unistd.h
_SYSCALLS = {"x86_64": 323, "aarch64": 282}
# linux/userfaultfd.h; the flag (Linux 5.11) spares it a privilege
_USER_MODE_ONLY, _API, _MISSING = 1, 0xAA, 1
_UFFDIO_API, _UFFDIO_REGISTER, _UFFDIO_UNREGISTER, _UFFDIO_COPY = (
    0xC018AA3F,
    0xC020AA00,
    0x8010AA01,
    0xC028AA03,
)
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


class FreshPages:
    """Userfaultfds of this process; several threads may fill different pages at once.

    Each call has one of its own: neighbours that are registered with the same are one range to the
    kernel, and who registers the second waits until the first is filled.

    Args:
        descriptors: of userfaultfds that are not in use; closed with it.
    """

    def __init__(self, descriptors: Iterable[int] = ()) -> None:
        self._idle = list(descriptors)

    @classmethod
    def open(cls) -> Self | None:
        """Ask the kernel for one.

        Returns:
            None where the system has none or does not let us (old kernels, most containers), and
            where every large range of memory comes in huge pages, which are worth more.
        """
        descriptor = None if _has_huge_pages() else _open()
        return None if descriptor is None else cls([descriptor])

    def close(self) -> None:
        """Give them back; none may be in use."""
        while self._idle:
            os.close(self._idle.pop())

    def fill(self, target: int, source: int, num_bytes: int) -> bool:
        """Bring in whole pages as copies.

        Args:
            target: address of the first page, in private memory without a file.
            source: address of what is copied, anywhere.
            num_bytes: a multiple of the size of a page.
        Returns:
            whether all is filled; if not (pages are there already, the source cannot be read, the
            memory is of another kind), whatever the pages hold is to be written by other means.
        """
        try:
            descriptor: int | None = self._idle.pop()
        except IndexError:
            descriptor = _open()
        if descriptor is None:
            return False
        pages = struct.pack("QQ", target, num_bytes)
        try:
            return _fill(descriptor, pages, source)
        finally:
            self._release(descriptor, pages)

    def _release(self, descriptor: int, pages: bytes) -> None:
        try:
            fcntl.ioctl(descriptor, _UFFDIO_UNREGISTER, bytearray(pages))
        except OSError:
            # closing gives all of its pages free
            os.close(descriptor)
        else:
            self._idle.append(descriptor)


def _open() -> int | None:
    number = _SYSCALLS.get(platform.machine()) if sys.platform == "linux" else None
    if number is None:
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = int(libc.syscall(number, os.O_CLOEXEC | _USER_MODE_ONLY))
    if descriptor < 0:
        return None
    try:
        fcntl.ioctl(descriptor, _UFFDIO_API, bytearray(struct.pack("QQQ", _API, 0, 0)))
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _fill(descriptor: int, pages: bytes, source: int) -> bool:
    target, num_bytes = struct.unpack("QQ", pages)
    register = bytearray(struct.pack("QQQQ", target, num_bytes, _MISSING, 0))
    copy = bytearray(struct.pack("QQQQq", target, source, num_bytes, 0, 0))
    try:
        fcntl.ioctl(descriptor, _UFFDIO_REGISTER, register)
        fcntl.ioctl(descriptor, _UFFDIO_COPY, copy)
    except OSError:
        return False
    return True


def whole_pages(address: int, num_bytes: int) -> tuple[int, int]:
    """The pages that lie in a range as a whole.

    Returns:
        start, end: relative to `address`; 0, 0 where there are none.
    """
    start = -address % mmap.PAGESIZE
    end = num_bytes - (address + num_bytes) % mmap.PAGESIZE
    return (start, end) if start < end else (0, 0)


def _has_huge_pages() -> bool:
    with contextlib.suppress(OSError):
        return "[always]" in _HUGE_PAGES.read_text(encoding="ascii")
    return False
