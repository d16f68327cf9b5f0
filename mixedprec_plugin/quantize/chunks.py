"""Pieces of a weight that are small enough to be worked on in the cache."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import torch

# About a second-level cache: smaller pieces pay for more calls, larger ones for memory traffic.
CHUNK_BYTES = 1 << 21
# beyond the CPU there is no such cache, and a call takes longer
DEVICE_FACTOR = 16
# Weights of fewer elements stay with torch: compiling would take longer than it gains.
LEAST_COMPILED: float = 1 << 20
# bytes of a cache line, which torch's own tensors begin at
_LINE = 64


def is_compiled(
    tensor: torch.Tensor,
    num_weights: int | None = None,
    dtypes: Collection[torch.dtype] = (torch.bfloat16, torch.uint8),
) -> bool:
    """Whether compiled loops work on a weight or on its codes, and not torch.

    Args:
        num_weights: of the whole weight that the tensor is a part of; its own if None.
        dtypes: what the loops read.
    """
    num_weights = tensor.numel() if num_weights is None else num_weights
    return (
        type(tensor) is torch.Tensor
        and tensor.device.type == "cpu"
        and tensor.dtype in dtypes
        and tensor.is_contiguous()
        and num_weights >= LEAST_COMPILED
    )


def empty(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None
) -> torch.Tensor:
    """Return a new tensor, for results.

    On a CPU numpy asks for huge pages, which torch does not: page faults of 4 KiB each take longer
    than the arithmetic.
    """
    if device is not None and device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    octets = np.empty(num_bytes + _LINE, np.uint8)
    start = -octets.ctypes.data % _LINE
    return torch.from_numpy(octets[start : start + num_bytes]).view(dtype).view(shape)


def row_chunks(
    num_rows: int,
    row_length: int,
    multiple: int = 1,
    device: torch.device | None = None,
    factor: int = 1,
) -> Iterator[slice]:
    """Cut rows into slices whose float32 copy takes about `CHUNK_BYTES`.

    Args:
        multiple: every slice but the last starts and ends at a multiple of this many rows.
        device: what works on them; they are larger beyond the CPU.
        factor: how many times as large slices are.
    Yields:
        Slices that cover 0..num_rows in order, each of at least `multiple` rows (the last may be
        shorter).
    """
    is_cpu = device is None or device.type == "cpu"
    num_bytes = CHUNK_BYTES * (factor if is_cpu else DEVICE_FACTOR)
    rows = max(num_bytes // (4 * max(row_length, 1)) // multiple, 1) * multiple
    for start in range(0, num_rows, rows):
        yield slice(start, min(start + rows, num_rows))


def float_chunks(weight: torch.Tensor, multiple: int = 1) -> Iterator[tuple[slice, torch.Tensor]]:
    """Copy a weight to float32, some rows at a time, always into the same buffer.

    A buffer that is used again stays in the cache; a new one for each chunk costs page faults that
    take longer than the arithmetic.

    Args:
        weight: [N, K], any floating dtype; not modified.
        multiple: as for `row_chunks`.
    Yields:
        The slice of rows, and their values, float32 [rows, K], which may be overwritten and are
        valid until the next step.
    """
    buffer = torch.empty(0)
    for rows in row_chunks(weight.shape[0], weight.shape[1], multiple, weight.device):
        chunk = weight[rows]
        if buffer.numel() < chunk.numel():
            buffer = torch.empty(chunk.numel(), device=weight.device)
        yield rows, buffer[: chunk.numel()].view(chunk.shape).copy_(chunk)
