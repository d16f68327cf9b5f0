"""Allocation against all assignments, one by one."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from mixedprec_plugin.search.allocate import Table, allocate, front, with_fewest_schemes


def random_table(seed: int, num_units: int = 7, num_candidates: int = 4) -> Table:
    generator = np.random.default_rng(seed)
    size = generator.integers(1, 1000, (num_units, num_candidates)).astype(float)
    loss = generator.lognormal(0, 2, (num_units, num_candidates)) / size
    # some units lack a candidate, but none lacks all
    loss[:, 1:][generator.random((num_units, num_candidates - 1)) < 0.2] = np.inf
    units = tuple(f"u{i}" for i in range(num_units))
    return Table(units, tuple(f"c{i}" for i in range(num_candidates)), loss, size)


def every_assignment(table: Table) -> list[tuple[int, float]]:
    options = [np.flatnonzero(np.isfinite(row)) for row in table.loss]
    found = (table.totals(np.array(one)) for one in itertools.product(*options))
    return [(num_bytes, loss) for loss, num_bytes in found]


@pytest.mark.parametrize("seed", range(12))
def test_nothing_within_the_budget_loses_less(seed: int) -> None:
    table = random_table(seed)
    assignments = every_assignment(table)
    sizes = sorted(size for size, _ in assignments)
    for budget in (sizes[0], sizes[len(sizes) // 9], sizes[len(sizes) // 2], sizes[-1]):
        best = min(loss for size, loss in assignments if size <= budget)
        found = allocate(table, budget)
        assert found.loss == pytest.approx(best, rel=1e-9)
        assert found.num_bytes <= budget
        assert found.bound <= best * (1 + 1e-9)
        assert found.gap < 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_front_is_the_lower_hull_of_all_assignments(seed: int) -> None:
    table = random_table(seed, 5)
    points = [table.totals(choice) for choice in front(table)]
    assignments = every_assignment(table)
    assert points[0][1] == min(size for size, _ in assignments)
    assert points[-1][0] == pytest.approx(min(loss for _, loss in assignments))
    for loss, size in points:
        assert loss == pytest.approx(min(x for s, x in assignments if s <= size))


def test_a_scheme_that_earns_next_to_nothing_is_given_up() -> None:
    loss = {f"u{i}": {"four": 1.0, "five": 0.5, "eight": 0.0} for i in range(10)}
    size = {f"u{i}": {"four": 40, "five": 60, "eight": 80} for i in range(10)}
    table = Table.of(loss, size)
    # for 620, one unit more in eight bits, if all others are in five or one of them in four
    exact, fewer = (with_fewest_schemes(table, 620, tolerance=t) for t in (0.0, 0.15))
    assert exact.loss == pytest.approx(4.5)
    assert len(set(exact.choice.values())) > 1
    assert set(fewer.choice.values()) == {"five"}
    assert fewer.loss == pytest.approx(5.0)
    assert fewer.bound == pytest.approx(4.5)


def test_a_scheme_that_a_unit_needs_is_not_given_up_for_another_without_end() -> None:
    # what serves one of the two does not serve the other
    loss = {"first": {"three": 1.0, "five": 1.0}, "second": {"four": 1.0}}
    size = {"first": {"three": 40, "five": 40}, "second": {"four": 40}}
    found = with_fewest_schemes(Table.of(loss, size), 100)
    assert found.loss == 2.0
    assert found.choice["second"] == "four"


def test_experts_that_are_decided_together_run_alike() -> None:
    table = random_table(3, 6, 3)
    groups = {unit: f"g{index % 2}" for index, unit in enumerate(table.units)}
    merged = table.together(groups)
    assert merged.units == ("g0", "g1")
    whole = np.isfinite(merged.loss)
    assert np.array_equal(whole[0], np.isfinite(table.loss[::2]).all(0))
    assert merged.loss[0, 0] == pytest.approx(table.loss[::2, 0].sum())


def test_a_model_of_70_000_experts_is_within_a_thousandth_of_the_bound() -> None:
    generator = np.random.default_rng(0)
    count, bits = 70_000, np.array([4.25, 4.5, 8.0, 16.0])
    scale = generator.lognormal(0, 2, (count, 1))
    loss = scale * np.array([1.0, 0.8, 0.003, 0.0]) * generator.lognormal(0, 0.3, (count, 4))
    size = np.tile(bits / 8 * 14_000_000, (count, 1)).round()
    names = tuple(map(str, range(count)))
    table = Table(names, ("4", "4.5", "8", "16"), loss, size)
    begun = time.monotonic()
    found = allocate(table, int(count * 14_000_000 * 5 / 8))
    assert time.monotonic() - begun < 600  # only that it ends: speed is the benchmark's
    assert found.gap < 1e-3
