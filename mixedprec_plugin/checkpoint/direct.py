"""Large tensors, read from their files straight into the parameters and checked on the way.

A tensor that goes into the model as it is stored need not be in memory before. What is handed out
for it is a mapping of its range of the file that nobody has touched. Where a weight loader copies
it, or a contiguous part of it, that range is read into the parameter instead, piece by piece, and
each piece is looked at for numbers that are not finite. To everything else the mapping is a tensor
like any other.

Threads read while the weight loaders go on; once these have to wait, the thread that waits reads,
too. Pieces are large, since to hand the interpreter from thread to thread has its price.
"""

from __future__ import annotations

import collections
import dataclasses
import mmap
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from mixedprec_plugin.checkpoint.finite import check_finite, is_finite
from mixedprec_plugin.checkpoint.fresh_pages import FreshPages, whole_pages
from mixedprec_plugin.checkpoint.headers import StoredTensor
from mixedprec_plugin.checkpoint.pages import bring_in, let_go
from mixedprec_plugin.checkpoint.reader import (
    Reader,
    map_file,
    raising_unread,
    read_into,
    view_mapped,
)

if TYPE_CHECKING:
    from typing_extensions import Self

# of files' pages that are being copied, at most, and as a share of the model
_BUDGET_BYTES = 64 << 20
_BUDGET_SHARE = 64
_MIN_PIECE_BYTES, _MAX_PIECE_BYTES = 1 << 20, 8 << 20
# for less, it takes longer to prepare pages that are copies from the start than it saves
_MIN_FILLED_BYTES = 3 << 20
# begun by nobody yet; it bounds how far the weight loaders, and the hints to the kernel, get ahead
_MAX_QUEUED = 32
# of a file, as which the kernel may bring pages in
_LARGE_FOLIO_BYTES = 2 << 20

Bytes = npt.NDArray[np.uint8]
Range = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class _File:
    """A file that is read from.

    Attributes:
        descriptor: of the file.
        private: a mapping of it, of which tensors are handed out; they may be written to.
        pages: another one, whose pages come and go as they are copied.
    """

    descriptor: int
    private: mmap.mmap
    pages: Bytes


@dataclasses.dataclass
class _Offer:
    """A tensor that was handed out.

    Attributes:
        stored: where it lies.
        file: there.
        value: the tensor in its private mapping.
        num_taken: its first bytes, which are read into parameters.
    """

    stored: StoredTensor
    file: _File
    value: torch.Tensor
    num_taken: int = 0


@dataclasses.dataclass(frozen=True)
class _Piece:
    """What is read at once.

    Attributes:
        offer: the tensor that it is of.
        data: where it goes.
        start: its first byte of the tensor's.
    """

    offer: _Offer
    data: Bytes
    start: int


class DirectReads:
    """Reads into parameters while the weight loaders go on.

    Args:
        num_bytes: of the model; pieces of a small one are small.
        num_threads: that read, with the one that waits for them; as many as torch computes with by
            default.
    Example:
        with DirectReads() as direct:
            source = direct.offer(stored, reader)
            if not direct.copy(parameter, source):
                parameter.copy_(source)
    """

    def __init__(self, num_bytes: int = 0, num_threads: int | None = None) -> None:
        self._num_helpers = max(1, (num_threads or torch.get_num_threads()) - 1)
        budget = min(_BUDGET_BYTES, num_bytes // _BUDGET_SHARE)
        share = budget // (self._num_helpers + 1)
        self._piece_bytes = min(max(share, _MIN_PIECE_BYTES), _MAX_PIECE_BYTES)
        self._helpers: ThreadPoolExecutor | None = None
        self._fresh: FreshPages | None = None
        self._files: dict[Path, _File] = {}
        # storage -> what lies there
        self._offers: dict[int, _Offer] = {}
        self._queue: collections.deque[_Piece] = collections.deque()
        self._running: list[Future[None]] = []
        # storage -> addresses that are being written
        self._targets: dict[int, list[Range]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Finish what was begun; after an error, see that nothing more is written."""
        try:
            if kind is None:
                self.settle()
                self.wait()
        finally:
            self.close()

    def offer(self, stored: StoredTensor, reader: Reader) -> torch.Tensor:
        """Hand out a tensor that is not read yet.

        Args:
            reader: whose files stay open until `wait` has returned.
        Raises:
            CheckpointError: the file cannot be opened, or ends early.
        """
        if stored.path not in self._files:
            self._files[stored.path] = _open_file(reader.descriptor(stored.path), stored)
        file = self._files[stored.path]
        value = view_mapped(file.private, stored)
        self._offers[storage_id(value)] = _Offer(stored, file, value)
        return value

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> bool:
        """Begin to read into `target` what `source` is a part of; return whether that can be.

        Raises:
            CheckpointError: of this tensor or one before.
        """
        offer = self._offers.get(storage_id(source))
        if offer is None or not _is_plain_copy(target, source):
            return False
        self.wait_for((target,))
        first = source.data_ptr() - offer.value.data_ptr()
        data = _bytes(target.detach())
        for start, end in _cut(data.ctypes.data, data.size, self._piece_bytes):
            self._queue.append(_Piece(offer, data[start:end], first + start))
        self._go_on()
        if first <= offer.num_taken:
            offer.num_taken = max(offer.num_taken, first + data.size)
        self._targets.setdefault(storage_id(target), []).append(_addresses(target))
        return True

    def withdraw(self, value: torch.Tensor) -> None:
        """Let a tensor that was handed out, and is about to be changed, be any other tensor.

        Raises:
            CheckpointError: its numbers are not finite, or cannot be read.
        """
        offer = self._offers.pop(storage_id(value), None)
        if offer is not None:
            self.wait()
            _check_rest(offer)

    @property
    def is_writing(self) -> bool:
        """Whether there is anything to wait for."""
        return bool(self._targets)

    def wait_for(self, tensors: Iterable[object]) -> None:
        """Wait if a part of one of these is still being written.

        Raises:
            CheckpointError: as `wait` does.
        """
        if any(isinstance(tensor, torch.Tensor) and self._is_written(tensor) for tensor in tensors):
            self.wait()

    def wait(self) -> None:
        """Wait for all reads.

        Raises:
            CheckpointError: a file could not be read, or holds numbers that are not finite.
        """
        self._read_queued()
        while self._running:
            self._running.pop().result()
        self._targets.clear()

    def settle(self) -> None:
        """Look at what was handed out and not copied whole, as a rank's part is not.

        Raises:
            CheckpointError: as `wait` does.
        """
        while self._offers:
            _, offer = self._offers.popitem()
            _check_rest(offer)
            if offer.num_taken < offer.stored.num_bytes:
                # pages of the mapping would count as ours until the file is closed
                first = -(-offer.stored.start // mmap.PAGESIZE) * mmap.PAGESIZE
                length = offer.stored.start + offer.stored.num_bytes - first
                offer.file.private.madvise(mmap.MADV_DONTNEED, first, length)

    def close(self) -> None:
        """Read no further, and forget what was handed out."""
        self._queue.clear()
        if self._helpers is not None:
            self._helpers.shutdown()
            self._helpers = None
        if self._fresh is not None:
            self._fresh.close()
            self._fresh = None
        self._running.clear()
        self._files.clear()
        self._offers.clear()
        self._targets.clear()

    def _go_on(self) -> None:
        """Keep the helpers busy, and help them where they fall behind."""
        if self._helpers is None:
            self._helpers = ThreadPoolExecutor(self._num_helpers, "mixedprec-direct")
            self._fresh = FreshPages.open()
        for future in [future for future in self._running if future.done()]:
            self._running.remove(future)
            future.result()
        while len(self._running) < min(self._num_helpers, len(self._queue)):
            self._running.append(self._helpers.submit(self._read_queued))
        self._read_queued(_MAX_QUEUED)

    def _read_queued(self, num_left: int = 0) -> None:
        """Read until the queue is no longer than that."""
        while len(self._queue) > num_left:
            try:
                piece = self._queue.popleft()
            except IndexError:
                # another thread was faster
                return
            try:
                _read(piece, self._fresh)
            except BaseException:
                # the load has failed
                self._queue.clear()
                raise

    def _is_written(self, tensor: torch.Tensor) -> bool:
        ranges = self._targets.get(storage_id(tensor))
        if not ranges:
            return False
        start, end = _addresses(tensor)
        return any(start < other_end and other_start < end for other_start, other_end in ranges)


def storage_id(tensor: torch.Tensor) -> int:
    """Tell tensors apart that are not views of each other, while they live."""
    return int(tensor.untyped_storage()._cdata)


def _open_file(descriptor: int, stored: StoredTensor) -> _File:
    private = map_file(descriptor, stored, is_whole=True)
    with raising_unread(stored):
        shared = mmap.mmap(descriptor, len(private), access=mmap.ACCESS_READ)
    return _File(descriptor, private, np.frombuffer(shared, dtype=np.uint8))


def _cut(address: int, num_bytes: int, max_bytes: int) -> Iterator[Range]:
    """Split a range evenly, where pages end; [start, end), relative to its address."""
    num_pieces = -(-num_bytes // max_bytes)
    start = 0
    for index in range(1, num_pieces + 1):
        end = num_bytes
        if index < num_pieces:
            end = num_bytes * index // num_pieces
            end -= (address + end) % mmap.PAGESIZE
        yield start, end
        start = end


def _read(piece: _Piece, fresh: FreshPages | None) -> None:
    offer, data = piece.offer, piece.data
    if fresh is None or not _fill(piece, fresh):
        with raising_unread(offer.stored):
            bring_in(data.ctypes.data, data.size, to_write=True)
        _read_part(piece, 0, data.size)
    _check(offer, data)


def _fill(piece: _Piece, fresh: FreshPages) -> bool:
    """Copy what is whole pages of the target from the page cache, and read the ends."""
    offer, data = piece.offer, piece.data
    target = data.ctypes.data
    start, end = whole_pages(target, data.size)
    position = offer.stored.start + piece.start
    source = offer.file.pages.ctypes.data + position
    if position + data.size > offer.file.pages.size or end - start < _MIN_FILLED_BYTES:
        return False
    try:
        bring_in(source + start, end - start)
        is_filled = fresh.fill(target + start, source + start, end - start)
    except OSError:
        # reading will tell why
        return False
    finally:
        _let_go(offer.file.pages, position, data.size)
    if is_filled:
        _read_part(piece, 0, start)
        _read_part(piece, end, data.size)
    return is_filled


def _read_part(piece: _Piece, start: int, end: int) -> None:
    if start < end:
        offer = piece.offer
        part = piece.data[start:end]
        read_into(part, offer.file.descriptor, offer.stored, piece.start + start)


def _let_go(pages: Bytes, start: int, num_bytes: int) -> None:
    """Unmap a range, with what the kernel may have brought in around it."""
    first = start - start % _LARGE_FOLIO_BYTES
    end = start + num_bytes
    last = min(pages.size, end + -end % _LARGE_FOLIO_BYTES)
    let_go(pages.ctypes.data + first, last - first)


def _check_rest(offer: _Offer) -> None:
    rest = _bytes(offer.value)[offer.num_taken :]
    if rest.size and offer.value.is_floating_point():
        with raising_unread(offer.stored):
            bring_in(rest.ctypes.data, rest.size)
        _check(offer, rest)


def _check(offer: _Offer, piece: Bytes) -> None:
    if not is_finite(piece, offer.value.dtype):
        check_finite(offer.stored, offer.value)


def _is_plain_copy(target: torch.Tensor, source: torch.Tensor) -> bool:
    return (
        target.device.type == "cpu"
        and target.dtype == source.dtype
        and target.shape == source.shape
        and target.is_contiguous()
        and source.is_contiguous()
    )


def _bytes(value: torch.Tensor) -> Bytes:
    data: Bytes = value.reshape(-1).view(torch.uint8).numpy()
    return data


def _addresses(tensor: torch.Tensor) -> Range:
    """From the first to the last element, and what lies between them."""
    start = tensor.data_ptr()
    if not tensor.numel():
        return start, start
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps)
    return start, start + (last + 1) * tensor.element_size()
