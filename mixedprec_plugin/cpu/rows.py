"""What all linear methods do around their product: flatten the tokens, add the bias."""

from __future__ import annotations

from collections.abc import Callable

import torch


def multiply_rows(
    multiply: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Apply a product of rows to activations of any number of dimensions.

    Args:
        multiply: [T, K] -> [T, N] in the dtype of x.
        x: [..., K]; may hold no token.
        bias: [N] or None; added after the product has been rounded, as SGLang's CUDA paths do.
    Returns:
        [..., N] in the dtype of x.
    """
    out = multiply(x.reshape(-1, x.shape[-1]))
    out = out.view(*x.shape[:-1], out.shape[-1])
    return out if bias is None else out + bias
