"""Weights that are NaN or infinite, found in their bits.

An IEEE number is NaN or infinite where all bits of its exponent are set. The greatest of these bits
is clear in every number between -2 and 2, as nearly all weights are: one pass over the bits, ored,
tells. For the others: read as integers, what is not finite is the largest of all; of the signed
ones where the sign bit is clear, of the unsigned ones where it is set. Two maxima over pieces that
fit a core's cache cost less than one pass over the numbers. Numpy lets other threads run meanwhile.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mixedprec_plugin.checkpoint.headers import StoredTensor
from mixedprec_plugin.errors import CheckpointError, Problem

# signed integer of the same size, the bits of infinity (of a NaN where there is none)
_FIRST_BITS: dict[torch.dtype, tuple[Any, int]] = {
    torch.float8_e4m3fn: (np.int8, 0x7F),
    torch.float8_e5m2: (np.int8, 0x7C),
    torch.float16: (np.int16, 0x7C00),
    torch.bfloat16: (np.int16, 0x7F80),
    torch.float32: (np.int32, 0x7F800000),
    torch.float64: (np.int64, 0x7FF0000000000000),
}
_PIECE_BYTES = 1 << 20


def check_finite(tensor: StoredTensor, value: torch.Tensor) -> None:
    """Refuse a tensor that has a number which is NaN or infinite.

    Args:
        value: what came of it, contiguous on the CPU.
    Raises:
        CheckpointError: with the count of them.
    """
    if value.dtype not in _FIRST_BITS or _is_finite(value):
        return
    plain = value.float()
    count = plain.numel() - int(torch.isfinite(plain).sum())
    what = f"{count:,} of {value.numel():,} weights in {tensor.path.name} are NaN or infinite"
    remedy = "the checkpoint is damaged; download it again"
    raise CheckpointError(Problem(tensor.name, what, remedy, "finite"))


def _is_finite(value: torch.Tensor) -> bool:
    integer, first = _FIRST_BITS[value.dtype]
    sign = 1 << (8 * value.itemsize - 1)
    data = value.reshape(-1).view(torch.uint8).numpy()
    for start in range(0, data.size, _PIECE_BYTES):
        signed = data[start : start + _PIECE_BYTES].view(integer)
        unsigned = signed.view(np.dtype(integer).str.replace("i", "u"))
        if value.itemsize > 1 and not int(np.bitwise_or.reduce(unsigned)) & (sign >> 1):
            continue
        if int(signed.max()) >= first or int(unsigned.max()) >= sign + first:
            return False
    return True
