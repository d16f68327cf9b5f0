"""FP4 weights multiplied as Marlin's kernels do: the scale of the whole last, and rounded twice.

q * scale is exact in 16 bits, sums are float32. A sum is rounded to the activation's dtype. NVFP4's
is then multiplied by the scale of the whole, which is rounded to it, too: sums are 2^-7 of what
they stand for, and the scale of the whole 2^7: float16 would not hold them. MXFP4 has no such
scale, and its activations are bfloat16 alone.
Source: SGLang 0.5.23, kernels/jit/csrc/gemm/marlin/marlin_template.h:1352-1367 and
marlin_moe/marlin_template.h:394, 584, 1631; marlin_utils_fp4.py:39-57 folds scales without
rounding.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from mixedprec_plugin.quantize.chunks import row_chunks
from mixedprec_plugin.quantize.fp4 import decode

_SUM_SCALE = 2.0**-7


def multiply(
    x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, sum_scale: float = _SUM_SCALE
) -> torch.Tensor:
    """Multiply by q * scale * 2^-7; the rest, `whole_scale`, is left to the caller.

    Args:
        x: [T, K], bfloat16 or float16.
        packed: uint8 [N, K/2].
        scales: float8 [N, K/G].
        sum_scale: what sums are multiplied by; 1 where there is no scale of the whole.
    Returns:
        [T, N] in the dtype of x.
    """
    values = x.float()
    out = x.new_empty((x.shape[0], packed.shape[0]))
    buffer = torch.empty(0)
    for rows in row_chunks(packed.shape[0], x.shape[1]):
        chunk = packed[rows]
        if buffer.numel() < 2 * chunk.numel():
            buffer = torch.empty(2 * chunk.numel())
        weight = buffer[: 2 * chunk.numel()].view(len(chunk), -1)
        out[:, rows] = linear(values, decode(chunk, scales[rows], weight)).mul_(sum_scale)
    return out


def whole_scale(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What products are multiplied by for the scale of the whole, one element in their dtype."""
    return scale.to(dtype) / _SUM_SCALE
