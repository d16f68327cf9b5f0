"""Reading ahead: threads bring in and check the tensors that are wanted next.

Two windows run in front of the tensor that is taken. In the near one tensors are mapped and
checked, and count as this process's memory. In the far one the kernel is told to read their ranges
into its page cache, which is nobody's memory. Both are bounded, whatever the model's size. From a
cold disk small tensors one by one take several times as long without the far one. Where tensors
are read directly, into a CPU's memory, the near one has no use.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from mixedprec_plugin.checkpoint.direct import DirectReads
from mixedprec_plugin.checkpoint.headers import StoredTensor
from mixedprec_plugin.checkpoint.reader import AS_USUAL, Reader, Reading
from mixedprec_plugin.checkpoint.together import ranges, read_together

# of tensors that are in memory and not yet taken, at most
BUDGET_BYTES = 64 << 20
# where the model is small, so is what is read ahead of it
_BUDGET_SHARE = 128
_MIN_BUDGET_BYTES = 2 << 20
_PAGE_CACHE_BYTES = 256 << 20
# small tensors are read together: a thread has its price
_BATCH_BYTES = 1 << 20
# smaller ones on an average are not read by threads: to hand the interpreter from one to another
# and back takes longer than to read
_THREAD_BYTES = 128 << 10
_NUM_THREADS = 4

Batch = Sequence[StoredTensor]
Tensors = list[torch.Tensor | None]


class ReadAhead(Reader):
    """A reader that knows what it will be asked for.

    Tensors that are asked for out of turn are read then and there.

    Args:
        schedule: tensors in the order in which `read_finite` will be called.
        how: how files are read.
        is_lean: leave the near window out, and with it the memory that it takes.
        direct: reads what goes into the model as it is stored; the near window is left out, too.
    """

    def __init__(
        self,
        schedule: Iterable[StoredTensor],
        how: Reading = AS_USUAL,
        *,
        is_lean: bool = False,
        direct: DirectReads | None = None,
    ) -> None:
        super().__init__(how)
        tensors = tuple(schedule)
        self._is_lean = is_lean or direct is not None
        self._direct = direct
        share = max(_MIN_BUDGET_BYTES, _num_bytes(tensors) // _BUDGET_SHARE)
        self._budget = min(BUDGET_BYTES, share)
        self._batches = _batches(tensors, min(_BATCH_BYTES, self._budget // 2))
        self._pending: dict[int, Future[Tensors]] = {}
        self._current: collections.deque[tuple[StoredTensor, torch.Tensor | None]] = (
            collections.deque()
        )
        # the batches that are taken, read and hinted at next
        self._next_taken = self._next_read = self._next_hint = 0
        self._read_bytes = self._hinted_bytes = self._taken_bytes = 0
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "mixedprec-read")

    def read_finite(self, tensor: StoredTensor) -> torch.Tensor:
        """Take a tensor; see `Reader.read_finite`."""
        self._look_ahead()
        self._taken_bytes += tensor.num_bytes
        if not self._current and self._is_next(tensor):
            batch, pending = self._take_batch()
            values = self._read_batch(batch) if pending is None else pending.result()
            self._current.extend(zip(batch, values, strict=True))
        if not self._current or self._current[0][0] != tensor:
            return super().read_finite(tensor)
        self._read_bytes -= tensor.num_bytes
        value = self._current.popleft()[1]
        self._look_ahead()
        return super().read_finite(tensor) if value is None else value

    def read_to_place(self, tensor: StoredTensor) -> torch.Tensor:
        """Take a tensor that goes into the model as it is stored; see `read_finite`.

        Where it is read directly, it is looked at on its way, or by `settle`.
        """
        if self._direct is None or not self.is_mapped(tensor):
            return self.read_finite(tensor)
        self._look_ahead()
        self._taken_bytes += tensor.num_bytes
        if self._is_next(tensor):
            self._take_batch()
            self._read_bytes -= tensor.num_bytes
        return self._direct.offer(tensor, self)

    def settle(self) -> None:
        """Look at what was read to be placed, and was not looked at on its way.

        Raises:
            CheckpointError: not all is finite.
        """
        if self._direct is not None:
            self._direct.settle()

    def close(self) -> None:
        """Stop reading and close all files."""
        if self._direct is not None:
            self._direct.close()
        self._pending.clear()
        self._current.clear()
        self._threads.shutdown(cancel_futures=True)
        super().close()

    def _is_next(self, tensor: StoredTensor) -> bool:
        index = self._next_taken
        return index < len(self._batches) and self._batches[index][0] == tensor

    def _take_batch(self) -> tuple[Batch, Future[Tensors] | None]:
        index = self._next_taken
        self._next_taken += 1
        if self._next_read <= index:
            # nobody read it before
            self._next_read = index + 1
            self._read_bytes += _num_bytes(self._batches[index])
        return self._batches[index], self._pending.pop(index, None)

    def _look_ahead(self) -> None:
        if self._hinted_bytes - self._taken_bytes < _PAGE_CACHE_BYTES // 2:
            self._hint_on()
        while self._next_read < len(self._batches) and not self._is_lean:
            batch = self._batches[self._next_read]
            if self._read_bytes and self._read_bytes + _num_bytes(batch) > self._budget:
                return
            if _num_bytes(batch) >= len(batch) * _THREAD_BYTES:
                self._pending[self._next_read] = self._threads.submit(self._read_batch, batch)
            self._next_read += 1
            self._read_bytes += _num_bytes(batch)

    def _hint_on(self) -> None:
        first = self._next_hint
        far = self._taken_bytes + _PAGE_CACHE_BYTES
        while self._next_hint < len(self._batches) and self._hinted_bytes < far:
            self._hinted_bytes += _num_bytes(self._batches[self._next_hint])
            self._next_hint += 1
        if first < self._next_hint:
            self._threads.submit(self._hint, self._batches[first : self._next_hint])

    def _read_batch(self, batch: Batch) -> Tensors:
        if len(batch) == 1:
            return [super().read_finite(batch[0])]
        values = read_together(self.descriptor(batch[0].path), batch)
        # what is wrong with one is said of it, and when it is taken
        return [None] * len(batch) if values is None else list(values)

    def _hint(self, batches: Sequence[Batch]) -> None:
        """Have the kernel start reading."""
        if not hasattr(os, "posix_fadvise"):
            return
        for batch in batches:
            descriptor = self.descriptor(batch[0].path)
            for start, end in ranges(batch):
                os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_WILLNEED)


def _batches(tensors: Sequence[StoredTensor], max_bytes: int) -> list[Batch]:
    """Split a schedule where tensors are large or lie in another file."""
    batches: list[list[StoredTensor]] = []
    size = 0
    for tensor in tensors:
        size += tensor.num_bytes
        if batches and batches[-1][-1].path == tensor.path and size <= max_bytes:
            batches[-1].append(tensor)
        else:
            batches.append([tensor])
            size = tensor.num_bytes
    return list(batches)


def _num_bytes(tensors: Iterable[StoredTensor]) -> int:
    return sum(tensor.num_bytes for tensor in tensors)
