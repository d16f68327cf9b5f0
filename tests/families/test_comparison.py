"""What counts as near, on logits made by hand."""

from __future__ import annotations

import torch

from benchmarks.families.comparison import distance


def spread(num_positions: int) -> torch.Tensor:
    """Logits with standard deviation 1 (of 5 values, unbiased), greatest at the last."""
    row = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])
    return (row / row.std()).repeat(num_positions, 1)


def test_distance_is_a_part_of_the_standard_deviation() -> None:
    reference = spread(3)
    near = distance(reference + 0.01, reference, 3)
    assert abs(near.error - 0.01) < 1e-6
    assert near.differing == 0


def test_token_that_rounding_explains_is_forgiven() -> None:
    reference = spread(2)
    reference[:, 3] = reference[:, 4] - 0.01
    got = reference.clone()
    got[:, 3] += 0.02
    near = distance(got, reference, 2)
    assert (near.differing, near.unexplained) == (2, 0)
    assert near.is_within("bf16")


def test_token_beyond_the_error_is_not() -> None:
    reference = spread(1).repeat(1, 100)
    reference[0, 0], reference[0, 1] = 9.0, 4.0
    got = reference.clone()
    got[0, 1] = 9.1
    assert distance(got, reference, 1).unexplained == 1


def test_wrong_logits_are_too_far() -> None:
    reference = spread(4)
    assert not distance(reference.flip(1), reference, 4).is_within("fp8")


def test_a_quarter_of_the_positions_may_be_off() -> None:
    reference = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    got = reference.clone()
    got[:2] += 0.5 * torch.randn(2, 64, generator=torch.Generator().manual_seed(2))
    assert distance(got, reference, 1).is_within("bf16")
    got[2] += 0.5
    assert not distance(got, reference, 1).is_within("bf16")
