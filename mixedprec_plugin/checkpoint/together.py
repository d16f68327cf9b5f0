"""Small tensors that lie side by side in a file: one read, and one look at the numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from mixedprec_plugin.checkpoint.finite import is_finite
from mixedprec_plugin.checkpoint.headers import StoredTensor
from mixedprec_plugin.checkpoint.reader import TORCH_DTYPES, read_into
from mixedprec_plugin.errors import CheckpointError


def read_together(descriptor: int, tensors: Sequence[StoredTensor]) -> list[torch.Tensor] | None:
    """Read several tensors of a file.

    Args:
        descriptor: of the file.
        tensors: of different names, in any order.
    Returns:
        the tensors, each with a storage of its own as far as torch can tell; None where they
        cannot be read so, or are not all finite.
    """
    if any(x.dtype not in TORCH_DTYPES or not x.num_bytes for x in tensors):
        return None
    found: dict[str, torch.Tensor] = {}
    for start, end, run in _runs(tensors):
        data = np.empty(end - start, dtype=np.uint8)
        try:
            read_into(data, descriptor, run[0])
        except CheckpointError:
            return None
        for name, same in itertools.groupby(run, lambda x: x.dtype):
            dtype, group = TORCH_DTYPES[name], tuple(same)
            first, last = group[0].start - start, group[-1].start + group[-1].num_bytes - start
            if first % dtype.itemsize or not is_finite(data[first:last], dtype):
                return None
            for x in group:
                count, offset = x.num_bytes // dtype.itemsize, x.start - start
                flat = torch.frombuffer(data, dtype=dtype, count=count, offset=offset)
                found[x.name] = flat.view(x.shape)
    return [found[x.name] for x in tensors]


def ranges(tensors: Sequence[StoredTensor]) -> Iterator[tuple[int, int]]:
    """Where tensors lie in their file, [start, end), neighbours as one."""
    for start, end, _ in _runs(tensors):
        yield start, end


def _runs(
    tensors: Sequence[StoredTensor],
) -> Iterator[tuple[int, int, Sequence[StoredTensor]]]:
    """Tensors that touch each other, in the file's order, and where they lie."""
    ordered = sorted(tensors, key=lambda x: x.start)
    begin = 0
    for index, tensor in enumerate(ordered, 1):
        end = tensor.start + tensor.num_bytes
        if index == len(ordered) or ordered[index].start != end:
            yield ordered[begin].start, end, ordered[begin:index]
            begin = index
