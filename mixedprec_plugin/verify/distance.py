"""Relative error and cosine of two weights, a few rows at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch

from mixedprec_plugin.quantize.chunks import row_chunks

Columns = tuple[torch.Tensor, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Distance:
    """How far a weight is from its reference.

    Attributes:
        relative_error: |W - R| / |R|; 0 where both are zero, infinite where only R is.
        cosine: of the angle between them; 1 where both are zero, 0 where only one is.
    """

    relative_error: float
    cosine: float


def distance(
    weight: torch.Tensor,
    reference: torch.Tensor,
    columns: Columns | None = None,
    rows: torch.Tensor | None = None,
) -> Distance:
    """Compare two tensors of one shape.

    Args:
        weight, reference: of any shape, floating point; not modified.
        columns: [K] factors for the columns of each.
        rows: [N] factors for the rows of the reference.
    """
    dot = squares = squares_reference = squares_error = 0.0
    for chunk, one, other in _chunks(weight, reference, columns):
        if rows is not None:
            other = other * rows[chunk].double()[:, None]
        dot += float((one * other).sum())
        squares += float(one.square().sum())
        squares_reference += float(other.square().sum())
        squares_error += float((one - other).square().sum())
    if not squares_reference:
        return Distance(math.inf if squares else 0.0, 0.0 if squares else 1.0)
    cosine = dot / math.sqrt(squares * squares_reference) if squares else 0.0
    return Distance(math.sqrt(squares_error / squares_reference), cosine)


def row_factors(
    weight: torch.Tensor, reference: torch.Tensor, columns: Columns | None
) -> torch.Tensor:
    """The factor of each row that brings a reference nearest to a weight.

    Args:
        weight, reference: [N, K], floating point; not modified.
    Returns:
        float64 [N]; 1 where a row of the reference is zero.
    """
    factors = torch.ones(weight.shape[0], dtype=torch.float64)
    for chunk, one, other in _chunks(weight, reference, columns):
        squares = other.square().sum(1)
        nearest = (one * other).sum(1) / squares.clamp(min=1e-300)
        factors[chunk] = torch.where(squares > 0, nearest, 1.0)
    return factors


def _chunks(
    weight: torch.Tensor, reference: torch.Tensor, columns: Columns | None
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Yield some rows, and what both have there, float64, columns multiplied by their factors."""
    # some tensors hold nothing, whose rows cannot be counted from their elements
    a, b = (x.reshape(1, -1) if x.ndim < 2 else x.flatten(0, -2) for x in (weight, reference))
    for chunk in row_chunks(*a.shape):
        one, other = a[chunk].double(), b[chunk].double()
        if columns is not None:
            one, other = one * columns[0].double(), other * columns[1].double()
        yield chunk, one, other
