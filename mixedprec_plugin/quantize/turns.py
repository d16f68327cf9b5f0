"""Products with a matrix along the diagonal: what rotations and their like are.

    x [..., heads * n], A [n, n]  ->  x diag(A, A, ...)

Source: compressed-tensors `apply_transform_weight`, `deterministic_hadamard_matrix` (Sylvester's
construction) and `HadamardTransform`, whose matrices of signs are over sqrt(n) as they run.
"""

from __future__ import annotations

import torch

from mixedprec_plugin.quantize.checks import refuse


def times(value: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Multiply each run of n last elements by a matrix [n, n]; of the matrix's dtype."""
    heads = value.to(matrix.dtype).reshape(-1, matrix.shape[0])
    return (heads @ matrix).reshape(value.shape)


def times_sylvester(value: torch.Tensor, size: int) -> torch.Tensor:
    """As `times`, by Sylvester's Hadamard matrix over sqrt(n), n a power of two; float32."""
    step, value = 1, value.float()
    shape = value.shape
    while step < size:
        one, other = value.reshape(-1, 2, step).unbind(1)
        value = torch.stack((one + other, one - other), 1)
        step *= 2
    return value.reshape(shape).div(size**0.5)


def signs(stored: torch.Tensor, where: str) -> torch.Tensor:
    """A stored Hadamard matrix [n, n], whatever it is scaled by, over sqrt(n); float32.

    Args:
        where: its name, for the error.
    Raises:
        ShapeError: its entries are not all of one magnitude.
    """
    least, most = stored.abs().aminmax()
    if not 0 < float(most) <= 1.01 * float(least):
        what = "its entries are not all of one magnitude (expected a Hadamard matrix)"
        refuse(where, what, "take the layer from another source", "transform")
    return stored.sign().float().div(stored.shape[0] ** 0.5)
