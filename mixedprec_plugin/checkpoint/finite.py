"""Weights that are NaN or infinite, found in one pass without a copy."""

from __future__ import annotations

import torch

from mixedprec_plugin.checkpoint.headers import StoredTensor
from mixedprec_plugin.errors import CheckpointError, Problem

# the bits of infinity, of a NaN where there is none
_FIRST_BITS = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7C}


def check_finite(tensor: StoredTensor, value: torch.Tensor) -> None:
    """Refuse a tensor that has a number which is NaN or infinite.

    Args:
        value: what came of it, contiguous on the CPU.
    Raises:
        CheckpointError: with the count of them.
    """
    if not value.is_floating_point() or not value.numel() or _is_finite(value):
        return
    plain = value.float()
    count = plain.numel() - int(torch.isfinite(plain).sum())
    what = f"{count:,} of {value.numel():,} weights in {tensor.path.name} are NaN or infinite"
    remedy = "the checkpoint is damaged; download it again"
    raise CheckpointError(Problem(tensor.name, what, remedy, "finite"))


def _is_finite(value: torch.Tensor) -> bool:
    if value.itemsize > 1:
        return bool(torch.isfinite(torch.stack(value.aminmax())).all())
    # torch has no extremes of 8 bits: of the integers of one sign, what is not finite is largest
    first, bits = _FIRST_BITS[value.dtype], value.view(torch.int8)
    return int(bits.max()) < first and int(bits.view(torch.uint8).max()) < 128 + first
