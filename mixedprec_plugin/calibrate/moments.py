"""H of a linear layer: what an error in its weight costs, by Fisher's information.

    H = sum over tokens of w x x',  w = mean over outputs of (dL/dy)^2

E H E' / 2, summed over rows and divided by the number of tokens, is the divergence in nats that an
error E causes, with rows and positions taken as independent. Correlations that few tokens tell are
noise: they are shrunk towards 0 by the estimate of Ledoit and Wolf. So are weights that few tokens
have: see `tempered`.
Source: Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices".
"""

from __future__ import annotations

import itertools

import torch

_TEMPER = 0.75
# tokens that are looked at once: few enough to stay in the processor's caches
_PRODUCT_TOKENS, _SQUARE_TOKENS = 2048, 256
# H is symmetric: of so many stripes of it, those on one side are multiplied
_STRIPES = 4


def tempered(weights: torch.Tensor) -> torch.Tensor:
    """What tokens count for H: a power of their weights, [T].

    A weight comes from one label that was drawn, and a few tokens have most of all weight. Between
    counting them so and counting all alike is where rounding loses least on other text.
    """
    return weights.pow(_TEMPER)


def nats(change: torch.Tensor) -> torch.Tensor:
    """What changes of a label's log-likelihood cost: half their square, beyond 1 what is linear."""
    change = change.abs()
    return torch.where(change < 1, 0.5 * change.square(), change - 0.5)


def second_moment(x: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Sum w x x' over tokens and shrink its correlations.

    Args:
        x: inputs [T, K], any floating dtype.
        weights: float32 [T], not negative.
    Returns:
        float32 [K, K], divided by T; and by how much its correlations were shrunk, 0 to 1.
    """
    T, K = x.shape
    H = torch.zeros(K, K, device=x.device)
    roots = (weights / T).sqrt()[:, None]
    bounds = [K * stripe // _STRIPES for stripe in range(_STRIPES + 1)]
    stripes = [slice(*pair) for pair in itertools.pairwise(bounds)]
    for tokens in _slices(T, _PRODUCT_TOKENS):
        scaled = x[tokens].float() * roots[tokens]
        for own in stripes:
            H[own, own.start :].addmm_(scaled[:, own].t(), scaled[:, own.start :])
    for own in stripes:
        H[own.stop :, own] = H[own, own.stop :].t()
    amount = shrinkage(x, weights, H)
    diagonal = H.diagonal().clone()
    H.mul_(1 - amount).diagonal().copy_(diagonal)
    return H, amount


def shrinkage(x: torch.Tensor, weights: torch.Tensor, H: torch.Tensor) -> float:
    """How far correlations go towards 0 so that the expected squared error is least.

    H is the mean of w x x' [K, K] over inputs and weights as of `second_moment`.
    """
    T = len(x)
    mean = weights.mean()
    variances = (H.diagonal() / mean).clamp(min=1e-20)
    deviations = variances.sqrt()
    correlations = H / mean / deviations / deviations[:, None]
    off = float(correlations.square().sum() - correlations.diagonal().square().sum())
    if off <= 0:
        return 1.0
    relative = (weights / mean).square().double()
    variance = 0.0
    for tokens in _slices(T, _SQUARE_TOKENS):
        squares = (x[tokens].float() / deviations).square_()
        products = squares.sum(1).double().square_() - squares.square_().sum(1)
        variance += float(relative[tokens] @ products)
    return min(max((variance / T**2 - off / T) / off, 0.0), 1.0)


def _slices(count: int, size: int) -> list[slice]:
    return [slice(first, first + size) for first in range(0, count, size)]
