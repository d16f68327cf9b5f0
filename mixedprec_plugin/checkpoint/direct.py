"""Large tensors, read from their files straight into the parameters and checked on the way.

A tensor that goes into the model as it is stored need not be in memory before. What is handed out
for it is a mapping of its range of the file that nobody has touched. Where a weight loader copies
it, or a contiguous part of it, threads read that range into the parameter instead, piece by piece,
and look for numbers that are not finite while a piece is in a core's cache. To everything else the
mapping is a tensor like any other.
"""

from __future__ import annotations

import collections
import dataclasses
import mmap
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from mixedprec_plugin.checkpoint.finite import check_finite, is_finite
from mixedprec_plugin.checkpoint.headers import StoredTensor
from mixedprec_plugin.checkpoint.pages import bring_in
from mixedprec_plugin.checkpoint.reader import (
    Reader,
    map_file,
    raising_unread,
    read_into,
    view_mapped,
)

if TYPE_CHECKING:
    from typing_extensions import Self

_PIECE_BYTES = 4 << 20
# being read, or waiting for a thread
_MAX_PIECES = 16

Bytes = npt.NDArray[np.uint8]
Range = tuple[int, int]


@dataclasses.dataclass
class _Offer:
    """A tensor that was handed out.

    Attributes:
        stored: where it lies.
        descriptor: of its file.
        mapped: the whole file.
        value: the tensor in there.
        num_taken: its first bytes, which are read into parameters.
    """

    stored: StoredTensor
    descriptor: int
    mapped: mmap.mmap
    value: torch.Tensor
    num_taken: int = 0


class DirectReads:
    """Reads into parameters while the weight loaders go on.

    Args:
        num_threads: that read; as many as torch computes with by default.
    Example:
        with DirectReads() as direct:
            source = direct.offer(stored, reader)
            if not direct.copy(parameter, source):
                parameter.copy_(source)
    """

    def __init__(self, num_threads: int | None = None) -> None:
        self._num_threads = num_threads or torch.get_num_threads()
        self._threads: ThreadPoolExecutor | None = None
        self._files: dict[Path, mmap.mmap] = {}
        # storage -> what lies there
        self._offers: dict[int, _Offer] = {}
        self._pending: collections.deque[Future[None]] = collections.deque()
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
        descriptor = reader.descriptor(stored.path)
        if stored.path not in self._files:
            self._files[stored.path] = map_file(descriptor, stored, is_whole=True)
        mapped = self._files[stored.path]
        value = view_mapped(mapped, stored)
        self._offers[storage_id(value)] = _Offer(stored, descriptor, mapped, value)
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
        for start in range(0, data.size, _PIECE_BYTES):
            self._submit(offer, data[start : start + _PIECE_BYTES], first + start)
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
        while self._pending:
            self._pending.popleft().result()
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
                offer.mapped.madvise(mmap.MADV_DONTNEED, first, length)

    def close(self) -> None:
        """Read no further, and forget what was handed out."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
            self._threads = None
        self._files.clear()
        self._offers.clear()
        self._pending.clear()
        self._targets.clear()

    def _submit(self, offer: _Offer, piece: Bytes, start: int) -> None:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self._num_threads, "mixedprec-direct")
        if len(self._pending) >= _MAX_PIECES:
            self._pending.popleft().result()
        self._pending.append(self._threads.submit(_read, offer, piece, start))

    def _is_written(self, tensor: torch.Tensor) -> bool:
        ranges = self._targets.get(storage_id(tensor))
        if not ranges:
            return False
        start, end = _addresses(tensor)
        return any(start < other_end and other_start < end for other_start, other_end in ranges)


def storage_id(tensor: torch.Tensor) -> int:
    """Tell tensors apart that are not views of each other, while they live."""
    return int(tensor.untyped_storage()._cdata)


def _read(offer: _Offer, piece: Bytes, start: int) -> None:
    with raising_unread(offer.stored):
        bring_in(piece.ctypes.data, piece.size, to_write=True)
    read_into(piece, offer.descriptor, offer.stored, start)
    _check(offer, piece)


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
