"""Where two runs part, and by how much."""

from __future__ import annotations

from benchmarks.tensor_parallel import Step, compare


def test_equal_tokens_have_no_gap() -> None:
    one = [[Step((5, 6), (20.0, 19.0)), Step((7, 6), (18.0, 17.0))]]
    two = [[Step((5, 6), (20.5, 19.0)), Step((7, 9), (18.0, 17.0))]]
    result = compare(one, two)
    assert (result.equal, result.gaps, result.change) == (1, (), 0.25)


def test_the_gap_is_taken_at_the_first_step_that_differs() -> None:
    one = [[Step((5, 6), (20.0, 19.0)), Step((7, 6), (18.0, 17.75)), Step((1, 2), (9.0, 3.0))]]
    two = [[Step((5, 6), (20.0, 19.0)), Step((6, 7), (18.0, 17.5)), Step((2, 1), (9.0, 3.0))]]
    result = compare(one, two)
    assert (result.equal, result.gaps, result.change) == (0, (0.25,), 0.0)
