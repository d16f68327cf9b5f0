"""H of a linear layer: what an error in its weight costs, by Fisher's information.

    H = sum over tokens of w x x',  w = mean over outputs of (dL/dy)^2

E H E' / 2, summed over rows and divided by the number of tokens, is the divergence in nats that an
error E causes, with rows and positions taken as independent. Correlations that few tokens tell are
noise: they are shrunk towards 0 by the estimate of Ledoit and Wolf.
Source: Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices".
"""

from __future__ import annotations

import torch


def second_moment(x: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Sum w x x' over tokens and shrink its correlations.

    Args:
        x: inputs [T, K], any floating dtype.
        weights: float32 [T], not negative.
    Returns:
        float32 [K, K], divided by T; and by how much its correlations were shrunk, 0 to 1.
    """
    T = len(x)
    values = x.float()
    scaled = values * weights[:, None].sqrt()
    H = scaled.t() @ scaled
    H.div_(T)
    amount = shrinkage(values, weights, H)
    diagonal = H.diagonal().clone()
    H.mul_(1 - amount).diagonal().copy_(diagonal)
    return H, amount


def shrinkage(x: torch.Tensor, weights: torch.Tensor, H: torch.Tensor) -> float:
    """How far correlations go towards 0 so that the expected squared error is least.

    Args:
        x: float32 [T, K].
        weights: float32 [T].
        H: mean of w x x', [K, K].
    """
    T = len(x)
    mean = weights.mean()
    deviations = (H.diagonal() / mean).clamp(min=1e-20).sqrt()
    correlations = H / mean / deviations / deviations[:, None]
    off = float(correlations.square().sum() - correlations.diagonal().square().sum())
    # in place: a copy of all tokens costs more than the arithmetic
    squares = (x / deviations).square_()
    relative = (weights / mean).square()
    norms = squares.sum(1).double()
    variance = relative.double() @ norms.square() - (relative @ squares.square_()).sum()
    if off <= 0:
        return 1.0
    return min(max((float(variance) / T**2 - off / T) / off, 0.0), 1.0)
