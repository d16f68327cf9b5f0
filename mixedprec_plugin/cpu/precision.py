"""Float32 matmuls of numbers that bfloat16 holds exactly, on CPUs that multiply bfloat16."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def exact_in_bfloat16(enabled: bool) -> Iterator[None]:
    """Let float32 matmuls inside multiply in bfloat16 and accumulate in float32.

    The operands must be exact in bfloat16, as e4m3 and int8 codes are: then it is only faster,
    four times with AMX. It does nothing on a CPU without bfloat16 instructions. The switch is
    torch's and global to the process; SGLang computes in one thread.

    Args:
        enabled: whether to switch at all; few rows are slower this way.
    """
    if not enabled:
        yield
        return
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
