"""Small tensors' values for planning: norms, biases, routers, rows of embeddings; without torch.

Read with plain reads of the byte ranges that headers tell, into numpy arrays of float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from mixedprec_plugin.checkpoint.files import file_error
from mixedprec_plugin.checkpoint.headers import StoredTensor, read_bytes
from mixedprec_plugin.checkpoint.hub import is_remote, read_remote

if TYPE_CHECKING:  # most plans read no values, and numpy takes a fifth of their time
    import numpy as np
    import numpy.typing as npt

    Array: TypeAlias = npt.NDArray[np.float32]

# safetensors name -> numpy's
_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4",
    "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?",
}  # fmt: skip
# of routers, the largest that are read, a model of 1,000 experts has 64 MiB
_MAX_BYTES = 256 << 20
# largest relative error of a rounding: half a unit in the last place
_ROUNDING = {"BF16": 2.0**-8, "F16": 2.0**-11}
# float16 rounds smaller numbers to multiples of this
_SUBNORMAL = 2.0**-24


class Values:
    """The values of stored tensors, each read once."""

    def __init__(self) -> None:
        self._read: dict[tuple[StoredTensor, tuple[int, ...]], Array] = {}

    @staticmethod
    def can_read(tensor: StoredTensor) -> bool:
        """Whether numpy has the tensor's dtype."""
        return tensor.dtype in _DTYPES

    def of(self, tensor: StoredTensor) -> Array:
        """Read a whole tensor; meant for small ones.

        Returns:
            float32, of the stored shape.
        Raises:
            CheckpointError: the file cannot be read or ends early.
        """
        return self._cached(tensor, ()).reshape(tensor.shape)

    def rows(self, tensor: StoredTensor, indices: Sequence[int]) -> Array:
        """Read some rows of a matrix [N, K].

        Returns:
            float32 [len(indices), K].
        Raises:
            CheckpointError: as `of` does.
        """
        return self._cached(tensor, tuple(indices)).reshape(len(indices), tensor.shape[1])

    def _cached(self, tensor: StoredTensor, rows: tuple[int, ...]) -> Array:
        key = (tensor, rows)
        if key not in self._read:
            size = tensor.num_bytes // tensor.shape[0] if rows else tensor.num_bytes
            if size > _MAX_BYTES:
                what = f"{tensor.name!r} has {size:,} bytes (expected up to {_MAX_BYTES:,})"
                raise file_error(tensor.path, f"{what}, for what the plan reads whole", remedy="")
            data = b"".join(_bytes(tensor, row * size, size) for row in rows or (0,))
            self._read[key] = _decoded(data, tensor)
        return self._read[key]


def are_equal(first: Array, second: Array, dtypes: Sequence[str]) -> bool:
    """Whether two arrays are copies of the same numbers, rounded to other dtypes.

    Args:
        dtypes: safetensors names of the dtypes that the numbers went through.
    """
    import numpy as np

    if first.shape != second.shape:
        return False
    # the coarsest counts, and an eighth more for a second rounding to one of the others
    tolerance = 1.125 * max((_ROUNDING.get(dtype, 2.0**-23) for dtype in dtypes), default=0.0)
    largest = np.maximum(np.abs(first), np.abs(second))
    return bool(np.all(np.abs(first - second) <= tolerance * largest + _SUBNORMAL))


def _bytes(tensor: StoredTensor, start: int, num_bytes: int) -> bytes:
    if is_remote(tensor.path):
        return read_remote(tensor, start, num_bytes)
    return read_bytes(tensor, start, num_bytes).tobytes()


def _decoded(data: bytes, tensor: StoredTensor) -> Array:
    import numpy as np

    if tensor.dtype not in _DTYPES:
        what = f"{tensor.name!r} is {tensor.dtype}, whose values the plan cannot read"
        raise file_error(tensor.path, what, remedy="")
    array = np.frombuffer(data, dtype=_DTYPES[tensor.dtype])
    assert len(array) * array.itemsize == len(data), (tensor, math.prod(tensor.shape))
    if tensor.dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)
