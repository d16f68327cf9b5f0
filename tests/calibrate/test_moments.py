"""Shrinkage against moments that are known."""

from __future__ import annotations

import pytest
import torch

from mixedprec_plugin.calibrate.moments import second_moment, tempered
from mixedprec_plugin.calibrate.rounding import Moments

K = 48


def tokens(count: int, seed: int) -> torch.Tensor:
    """Inputs whose second moment is `TRUE`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, K, generator=generator) @ ROOT.t()


ROOT = torch.eye(K) * torch.logspace(0, -1, K)
ROOT[1:, :1] = 0.3
TRUE = ROOT @ ROOT.t()


def in_correlations(H: torch.Tensor) -> torch.Tensor:
    deviations = TRUE.diagonal().sqrt()
    return H / deviations / deviations[:, None]


@pytest.mark.parametrize("count", [24, 96, 384])
def test_shrunk_is_closer_to_the_truth(count: int) -> None:
    plain_errors, shrunk_errors = [], []
    for seed in range(10):
        x = tokens(count, seed)
        H, amount = second_moment(x, torch.ones(count))
        assert 0 < amount < 1
        plain = x.t() @ x / count
        for made, errors in ((plain, plain_errors), (H, shrunk_errors)):
            errors.append(float(in_correlations(made - TRUE).square().sum()))
    assert sum(shrunk_errors) < sum(plain_errors)


def test_weighs_tokens() -> None:
    x = tokens(200, 0)
    weights = torch.rand(200, generator=torch.Generator().manual_seed(1))
    H, amount = second_moment(x, weights)
    expected = torch.einsum("t,ti,tj->ij", weights, x, x) / 200
    torch.testing.assert_close(H.diagonal(), expected.diagonal())
    off = ~torch.eye(K, dtype=torch.bool)
    torch.testing.assert_close(H[off], (1 - amount) * expected[off])


def test_few_heavy_tokens_are_trusted_less() -> None:
    x = tokens(400, 0)
    heavy = torch.full((400,), 1e-3)
    heavy[:8] = 1.0
    assert second_moment(x, heavy)[1] > 3 * second_moment(x, torch.ones(400))[1]


def test_scales_of_inputs_and_weights_change_no_amount() -> None:
    x, weights = tokens(100, 0), torch.ones(100)
    _, amount = second_moment(x, weights)
    _, scaled = second_moment(x * torch.logspace(-2, 2, K), weights * 1e-6)
    assert scaled == pytest.approx(amount, rel=1e-3)


def test_tokens_count_for_h_by_less_than_their_weight() -> None:
    x = torch.eye(2)
    weights = torch.tensor([16.0, 1.0])
    H, _ = Moments(x, weights, None).of(slice(0, 2))
    assert H.diagonal().tolist() == pytest.approx([8.0, 1.0])
    assert tempered(torch.ones(2)).tolist() == [1.0, 1.0]
