"""What counts as near, on logits made by hand."""

from __future__ import annotations

import torch

from benchmarks.families.comparison import LIMIT, Held, distance
from benchmarks.families.stepwise import Steps


def spread(num_positions: int) -> torch.Tensor:
    """Logits with standard deviation 1 (of 5 values, unbiased), greatest at the last."""
    row = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])
    return (row / row.std()).repeat(num_positions, 1)


def held(got: torch.Tensor, reference: torch.Tensor, **steps: object) -> Held:
    made = Steps(**steps)  # type: ignore[arg-type]
    return Held(distance(got, reference, len(reference)), made)


def test_limit_is_four_roundings_of_bfloat16() -> None:
    # half the distance from 1 to the number after it
    assert float(4 * torch.finfo(torch.bfloat16).eps / 2) == LIMIT


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
    near = held(got, reference)
    assert (near.logits.differing, near.logits.unexplained) == (2, 0)
    assert near.is_within


def test_token_beyond_the_error_is_not() -> None:
    reference = spread(1).repeat(1, 100)
    reference[0, 0], reference[0, 1] = 9.0, 4.0
    got = reference.clone()
    got[0, 1] = 9.1
    assert distance(got, reference, 1).unexplained == 1


def test_rounding_of_the_greatest_logits_is_forgiven() -> None:
    reference = torch.randn(1, 500, generator=torch.Generator().manual_seed(0))
    # neighbours in bfloat16, of which each run takes another
    reference[0, 0], reference[0, 1] = 9.0, 8.9375
    got = reference.clone()
    got[0, 1] = 9.0625
    near = distance(got, reference, 1)
    assert (near.differing, near.unexplained) == (1, 0)
    reference[0, 1] = 8.5
    assert distance(got, reference, 1).unexplained == 1


def test_one_position_too_far_is_too_far() -> None:
    reference = spread(24)
    got = reference.clone()
    assert held(got, reference).is_within
    got[7] += 1.1 * LIMIT
    assert not held(got, reference).is_within


def test_one_input_too_far_is_too_far() -> None:
    reference = spread(4)
    assert held(reference, reference, errors={"a": LIMIT}).is_within
    assert not held(reference, reference, errors={"a": LIMIT, "b": 1.1 * LIMIT}).is_within


def test_token_at_other_experts_than_rounding_explains_is_not_green() -> None:
    reference = spread(4)
    assert held(reference, reference, tied=3).is_within
    assert not held(reference, reference, elsewhere=1).is_within


def test_layer_that_the_engine_did_not_run_is_not_green() -> None:
    assert not held(spread(1), spread(1), missing={"model.layers.0.mlp.down_proj"}).is_within
