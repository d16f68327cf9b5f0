"""Reading tensors as torch's, through mappings of their files by the safetensors library.

Pages of a mapping count as the process's memory until it is closed: files are reopened after
every few MiB, which takes no time. Where nothing may be mapped, ranges of bytes are read instead:
the library would read a whole tensor for a part of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from mixedprec_plugin.checkpoint.files import file_error, open_plain
from mixedprec_plugin.checkpoint.finite import check_finite
from mixedprec_plugin.checkpoint.headers import (
    CHANGED,
    TORCH_NAMES,
    StoredTensor,
    open_tensors,
    read_bytes,
)
from mixedprec_plugin.checkpoint.hub import fetch_if_missing
from mixedprec_plugin.checkpoint.recorded import reading
from mixedprec_plugin.errors import CheckpointError, Problem

if TYPE_CHECKING:
    from typing_extensions import Self

TORCH_DTYPES: dict[str, torch.dtype] = {n: getattr(torch, d) for n, d in TORCH_NAMES.items()}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

# of mappings, before they are given up
_MAPPED_BYTES = 32 << 20
# less is copied out of a mapping
_LARGE_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Reading:
    """How files are read.

    Attributes:
        may_map: whether tensors may be mappings, and not reads into memory of their own.
        drops_cache: whether the kernel is told in the end that it need not keep the files' pages.
    """

    may_map: bool = True
    drops_cache: bool = False


AS_USUAL = Reading()


class Reader:
    """Reads tensors of safetensors files; keeps files open until it is closed.

    Example:
        with Reader() as reader:
            weight = reader.read(source.tensors["lm_head.weight"])
    """

    def __init__(self, how: Reading = AS_USUAL) -> None:
        self._how = how
        # with their sizes: what lies behind the end of a mapped file must not be touched
        self._files: dict[tuple[Path, int], safe_open] = {}
        self._paths: set[Path] = set()
        self._mapped_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        self._files.clear()
        while self._paths and self._how.drops_cache:
            path = self._paths.pop()
            with contextlib.suppress(OSError), open_plain(path) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def read(self, tensor: StoredTensor) -> torch.Tensor:
        """Read one tensor; what is written to it stays out of the file.

        Returns:
            the tensor on the CPU, with the stored dtype and shape.
        Raises:
            CheckpointError: the file is not what it was or cannot be downloaded, or its dtype is
                none that is read.
        """
        if tensor.dtype not in TORCH_DTYPES:
            what = f"{tensor.name!r} is {tensor.dtype} (expected {', '.join(TORCH_DTYPES)})"
            raise CheckpointError(Problem(str(tensor.path), what))
        if tensor.path not in self._paths:
            fetch_if_missing(tensor.path)
            self._paths.add(tensor.path)
        if self._how.may_map:
            return self._map(tensor)
        data = read_bytes(tensor, 0, tensor.num_bytes)
        # one of no bytes has no stride to be viewed by
        value = torch.from_numpy(data) if data.size else torch.empty(0, dtype=torch.uint8)
        return value.view(TORCH_DTYPES[tensor.dtype]).view(tensor.shape)

    def _map(self, tensor: StoredTensor) -> torch.Tensor:
        whole = tensor
        while whole.part_of is not None:
            whole = whole.part_of
        try:
            stored = self._open(tensor).get_tensor(whole.name)  # type: ignore[no-untyped-call]
        except SafetensorError as error:
            raise file_error(tensor.path, str(error), CHANGED) from error
        value: torch.Tensor = stored.view(-1)
        if (value.dtype, stored.shape) != (TORCH_DTYPES[whole.dtype], whole.shape):
            raise file_error(tensor.path, f"{whole.name!r} is another tensor now", CHANGED)
        # nothing is read yet; get_slice() would put a part on torch's default device
        first = (tensor.start - whole.start) // value.itemsize
        value = value[first : first + tensor.span_of(tensor.num_bytes) // value.itemsize]
        if tensor.step > 1:
            value = value.view(-1, math.prod(tensor.shape[1:]))[:: tensor.step].contiguous()
        value = value.view(tensor.shape)
        # norms are read again where columns are rescaled: what is written to one must not show
        return value if tensor.num_bytes >= _LARGE_BYTES else value.clone()

    def _open(self, tensor: StoredTensor) -> safe_open:
        self._mapped_bytes += tensor.num_bytes
        if self._mapped_bytes > _MAPPED_BYTES:
            self._files.clear()
            self._mapped_bytes = tensor.num_bytes
        with reading(tensor.path):
            key = tensor.path, tensor.path.stat().st_size
        if key not in self._files:
            self._files[key] = open_tensors(tensor.path, "pt", CHANGED)
        return self._files[key]

    def read_finite(self, tensor: StoredTensor) -> torch.Tensor:
        """Read one tensor and see that all of its numbers are finite.

        Raises:
            CheckpointError: some are not; or as `read` does.
        """
        value = self.read(tensor)
        check_finite(tensor, value)
        return value

    def read_part(self, tensor: StoredTensor, box: Sequence[range]) -> torch.Tensor:
        """Read a part of a tensor; of the bytes of others, those between its first and last row.

        Args:
            box: the indices wanted of each dimension, one after another.
        Returns:
            as `read_finite`, contiguous.
        Raises:
            CheckpointError: as `read_finite`.
        """
        rows, *others = (slice(indices.start, indices.stop) for indices in box)
        within = (slice(None), *others)
        if self._how.may_map:
            value = self.read(tensor)[rows][within].contiguous()
        else:
            num_bytes = tensor.num_bytes // max(tensor.shape[0], 1)
            run = tensor._replace(
                shape=(len(box[0]), *tensor.shape[1:]),
                start=tensor.start + rows.start * num_bytes * tensor.step,
                num_bytes=len(box[0]) * num_bytes,
            )
            value = self.read(run)[within].contiguous()
        check_finite(tensor, value)
        return value
