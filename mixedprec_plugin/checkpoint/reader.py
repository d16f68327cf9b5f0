"""Reading tensors: one plain read of exactly the bytes that are asked for.

Not a memory map: mapped pages count as the loading process's memory until they are dropped,
and page faults read the file in an order of their own.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, cast

import torch

from mixedprec_plugin.checkpoint.headers import StoredTensor
from mixedprec_plugin.checkpoint.hub import fetch_if_missing
from mixedprec_plugin.errors import CheckpointError, Problem

if TYPE_CHECKING:
    from typing_extensions import Buffer

TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class Reader:
    """Reads tensors of safetensors files; keeps files open until it is closed.

    Example:
        with Reader() as reader:
            weight = reader.read(source.tensors["lm_head.weight"])
    """

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def read(self, tensor: StoredTensor) -> torch.Tensor:
        """Read one tensor into fresh memory.

        Returns:
            the tensor on the CPU, with the stored dtype and shape.
        Raises:
            CheckpointError: the file ends early or cannot be downloaded, or its dtype is none that
                torch has.
        """
        if tensor.dtype not in TORCH_DTYPES:
            raise CheckpointError(
                Problem(
                    str(tensor.path), f"{tensor.name!r} is {tensor.dtype}, which torch cannot hold"
                )
            )
        buffer = torch.empty(tensor.num_bytes, dtype=torch.uint8)
        self._fill(buffer, tensor)
        return buffer.view(TORCH_DTYPES[tensor.dtype]).view(tensor.shape)

    def _fill(self, buffer: torch.Tensor, tensor: StoredTensor) -> None:
        if tensor.path not in self._descriptors:
            fetch_if_missing(tensor.path)
            self._descriptors[tensor.path] = os.open(tensor.path, os.O_RDONLY)
        view = memoryview(cast("Buffer", buffer.numpy()))
        done = 0
        while done < tensor.num_bytes:
            count = os.preadv(self._descriptors[tensor.path], [view[done:]], tensor.start + done)
            if count == 0:
                raise CheckpointError(
                    Problem(
                        str(tensor.path),
                        f"ends inside {tensor.name!r}",
                        "it changed while it was read; download it again",
                    )
                )
            done += count
