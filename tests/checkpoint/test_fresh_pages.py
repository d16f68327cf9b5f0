from __future__ import annotations

import ctypes
import mmap
import platform
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from mixedprec_plugin.checkpoint import fresh_pages
from mixedprec_plugin.checkpoint.fresh_pages import FreshPages, whole_pages

PAGE = mmap.PAGESIZE
Bytes = npt.NDArray[np.uint8]


@pytest.fixture
def fresh() -> Iterator[FreshPages]:
    made = FreshPages.open()
    if made is None:
        pytest.skip("this system has no userfaultfd for us, or brings memory in in huge pages")
    yield made
    made.close()


def _untouched(num_pages: int) -> Bytes:
    return np.frombuffer(mmap.mmap(-1, num_pages * PAGE, flags=mmap.MAP_PRIVATE), dtype=np.uint8)


def _random(num_bytes: int) -> Bytes:
    return np.random.default_rng(0).integers(0, 256, num_bytes, dtype=np.uint8)


def _fill(fresh: FreshPages, target: Bytes, source: Bytes) -> bool:
    return fresh.fill(target.ctypes.data, source.ctypes.data, target.size)


def _is_touched_at_once(target: Bytes) -> bool:
    """Who touches a page that is registered and missing waits for ever."""

    def touch() -> None:
        target[:] = 7

    thread = threading.Thread(target=touch, daemon=True)
    thread.start()
    thread.join(20)
    return not thread.is_alive()


@pytest.mark.parametrize("shift", [0, 1, 2, 4095])
def test_pages_are_filled_with_what_lies_anywhere(fresh: FreshPages, shift: int) -> None:
    target, source = _untouched(6), _random(5 * PAGE)
    assert _fill(fresh, target[PAGE : 5 * PAGE], source[shift:])
    assert np.array_equal(target[PAGE : 5 * PAGE], source[shift : shift + 4 * PAGE])
    assert not target[:PAGE].any()
    assert not target[5 * PAGE :].any()


def test_only_what_is_filled_is_brought_in(fresh: FreshPages) -> None:
    target = _untouched(64)
    _fill(fresh, target[: 8 * PAGE], _random(8 * PAGE))
    vector = np.zeros(64, dtype=np.uint8)
    libc = ctypes.CDLL(None)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    assert libc.mincore(target.ctypes.data, target.size, vector.ctypes.data) == 0
    assert (vector & 1).tolist() == [1] * 8 + [0] * 56


@pytest.mark.parametrize("touched", [0, 2, 3])
def test_page_that_is_there_already_is_left_alone(fresh: FreshPages, touched: int) -> None:
    target = _untouched(4)
    target[touched * PAGE] = 9
    assert not _fill(fresh, target, _random(4 * PAGE))
    assert target[touched * PAGE] == 9
    assert _is_touched_at_once(target)


def test_source_that_ends_early_is_no_crash(fresh: FreshPages, tmp_path: Path) -> None:
    path = tmp_path / "cut"
    path.write_bytes(bytes(4 * PAGE))
    with path.open("r+b") as file:
        source = np.frombuffer(
            mmap.mmap(file.fileno(), 4 * PAGE, access=mmap.ACCESS_READ), dtype=np.uint8
        )
        file.truncate(PAGE)
    target = _untouched(4)
    assert not _fill(fresh, target, source)
    assert _is_touched_at_once(target)


def test_memory_of_a_file_is_not_filled(fresh: FreshPages, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(PAGE))
    with path.open("r+b") as file:
        target = np.frombuffer(
            mmap.mmap(file.fileno(), PAGE, access=mmap.ACCESS_COPY), dtype=np.uint8
        )
    assert not _fill(fresh, target, _random(PAGE))
    assert _is_touched_at_once(target)


def test_threads_fill_neighbours_at_once(fresh: FreshPages) -> None:
    """A hundred times, since what goes wrong between threads goes wrong seldom."""
    num_pieces, size = 16, 16 * PAGE
    source = _random(num_pieces * size)
    with ThreadPoolExecutor(8) as threads:
        for _ in range(100):
            target = _untouched(num_pieces * 16)
            pieces = [slice(i * size, (i + 1) * size) for i in range(num_pieces)]
            done = threads.map(lambda x, y=target: _fill(fresh, y[x], source[x]), pieces)
            assert all(done)
            assert np.array_equal(target, source)


@pytest.mark.parametrize(
    ("text", "is_open"), [("[always] madvise never", False), ("always [madvise] never", True)]
)
@pytest.mark.usefixtures("fresh")
def test_huge_pages_are_left_to_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, is_open: bool
) -> None:
    path = tmp_path / "enabled"
    path.write_text(text)
    monkeypatch.setattr(fresh_pages, "_HUGE_PAGES", path)
    opened = FreshPages.open()
    assert (opened is not None) == is_open
    if opened is not None:
        opened.close()


def test_unknown_machine_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert FreshPages.open() is None


@pytest.mark.parametrize(
    ("address", "num_bytes", "expected"),
    [
        (0, PAGE, (0, PAGE)),
        (64, 3 * PAGE, (PAGE - 64, 3 * PAGE - 64)),
        (64, PAGE, (0, 0)),
        (PAGE - 1, PAGE + 1, (1, PAGE + 1)),
        (1, 2 * PAGE - 2, (0, 0)),
    ],
)
def test_whole_pages_of_a_range(address: int, num_bytes: int, expected: tuple[int, int]) -> None:
    assert whole_pages(7 * PAGE + address, num_bytes) == expected
