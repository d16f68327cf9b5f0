"""Scores x budget -> the candidate of every unit: a multiple-choice knapsack.

The price of a byte at which the cheapest candidates just fit gives a bound. Those that could be in
an assignment between it and the best that is known, HiGHS solves exactly: a few of the units.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Integers: TypeAlias = NDArray[np.int64]

_SECONDS = 20.0
# by how much more may be lost for a scheme less: far below what scores are good for
TOLERANCE = 0.01
_NUM_PRICES = 400
_MOST_FILLED = 10_000
# a share of the loss that is as good as none
_EXACT = 1e-6


@dataclasses.dataclass(frozen=True)
class Table:
    """What there is to choose from.

    Attributes:
        units: names of what is decided, U of them.
        candidates: names of the schemes, C of them.
        loss: [U, C], infinite where a unit has no such candidate.
        size: bytes, [U, C]; of no meaning there.
    """

    units: tuple[str, ...]
    candidates: tuple[str, ...]
    loss: Floats
    size: Floats

    @classmethod
    def of(
        cls, loss: Mapping[str, Mapping[str, float]], size: Mapping[str, Mapping[str, int]]
    ) -> Table:
        """Make one of numbers by unit and candidate; both know the same."""
        candidates = tuple(dict.fromkeys(name for own in loss.values() for name in own))
        column = {name: index for index, name in enumerate(candidates)}
        losses = np.full((len(loss), len(candidates)), np.inf)
        sizes = np.zeros_like(losses)
        for row, (unit, own) in enumerate(loss.items()):
            for name, value in own.items():
                losses[row, column[name]] = value
                sizes[row, column[name]] = size[unit][name]
        return cls(tuple(loss), candidates, losses, sizes)

    def only(self, candidates: Collection[str]) -> Table:
        """The same with some candidates; a unit that has none of them keeps all that it has."""
        is_kept = np.array([name in candidates for name in self.candidates])
        loss = np.where(is_kept, self.loss, np.inf)
        is_bare = ~np.isfinite(loss).any(1)
        return dataclasses.replace(self, loss=np.where(is_bare[:, None], self.loss, loss))

    def together(self, groups: Mapping[str, str]) -> Table:
        """The same with one decision for all units of a group, by unit -> name of its group."""
        names = tuple(dict.fromkeys(groups[unit] for unit in self.units))
        index = {name: row for row, name in enumerate(names)}
        rows = np.array([index[groups[unit]] for unit in self.units])
        loss, size = (np.zeros((len(names), len(self.candidates))) for _ in range(2))
        np.add.at(loss, rows, self.loss)
        np.add.at(size, rows, self.size)
        return Table(names, self.candidates, loss, size)

    @property
    def smallest(self) -> int:
        """Bytes of the smallest assignment."""
        return int(np.where(np.isfinite(self.loss), self.size, np.inf).min(1).sum())

    def at_price(self, price: float) -> Integers:
        """The candidate of every unit at a price of a byte, the smaller one of two that tie."""
        cost = self.loss + price * self.size
        least = cost.min(1, keepdims=True)
        # far below a difference that counts, far above rounding
        found: Integers = np.where(cost <= least * (1 + 1e-12), self.size, np.inf).argmin(1)
        return found

    def totals(self, choice: Integers) -> tuple[float, int]:
        """Loss and bytes of an assignment."""
        rows = np.arange(len(self.units))
        return float(self.loss[rows, choice].sum()), int(self.size[rows, choice].sum())

    def named(self, choice: Integers) -> dict[str, str]:
        """Unit -> candidate of an assignment."""
        return {u: self.candidates[c] for u, c in zip(self.units, choice, strict=True)}


@dataclasses.dataclass(frozen=True)
class Allocation:
    """What was chosen.

    Attributes:
        choice: unit -> candidate.
        loss, num_bytes: of all units.
        bound: what no assignment of these bytes loses less than.
    """

    choice: Mapping[str, str]
    loss: float
    num_bytes: int
    bound: float

    @property
    def gap(self) -> float:
        """How far it may be from the best, as a share of it."""
        return (self.loss - self.bound) / self.bound if self.bound > 0 else 0.0


def allocate(table: Table, budget: int, limit: float | None = None) -> Allocation:
    """Find the assignment of the least loss within a budget of bytes.

    Args:
        budget: no less than the smallest assignment takes.
        limit: a loss; with one, any assignment does that tells on which side of it the best one is.
    """
    price, choice, bound = _priced(table, budget)
    choice = _filled(table, choice, budget)
    if limit is None or bound <= limit < table.totals(choice)[0]:
        choice, bound = _solved(table, budget, price, choice, bound)
    loss, num_bytes = table.totals(choice)
    return Allocation(table.named(choice), loss, num_bytes, min(bound, loss))


def with_fewest_schemes(
    table: Table, budget: int, free: Collection[str] = (), tolerance: float = TOLERANCE
) -> Allocation:
    """Allocate, and give up schemes, but for those `free`, as long as that loses next to nothing.

    `tolerance` is the share by which the loss may rise in all.
    """
    best = allocate(table, budget)
    limit = best.loss * (1 + tolerance)
    kept, found = set(best.choice.values()), best
    while len(kept) > 1:
        tries = []
        for name in sorted(kept - set(free)):
            fewer = table.only(kept - {name})
            if fewer.smallest <= budget:
                made = allocate(fewer, budget, limit)
                # a unit that has no other scheme keeps its own, or takes another new one
                if made.loss <= limit and len(set(made.choice.values())) < len(kept):
                    tries.append((made.loss, name, made))
        if not tries:
            break
        found = min(tries, key=lambda one: one[:2])[2]
        kept = set(found.choice.values())
    if found is not best:
        found = allocate(table.only(kept), budget)
    return dataclasses.replace(found, choice=_in_runs(table, found.choice), bound=best.bound)


def _in_runs(table: Table, choice: Mapping[str, str]) -> dict[str, str]:
    """The same, but that of units which are alike the first ones have the larger candidates."""
    alike: dict[bytes, list[int]] = {}
    for row, (loss, size) in enumerate(zip(table.loss, table.size, strict=True)):
        alike.setdefault(loss.tobytes() + size.tobytes(), []).append(row)
    column = {name: index for index, name in enumerate(table.candidates)}
    found = dict(choice)
    for rows in alike.values():
        units, size = [table.units[row] for row in rows], table.size[rows[0]]
        names = sorted((choice[unit] for unit in units), key=lambda x: (-size[column[x]], x))
        found.update(zip(units, names, strict=True))
    return found


def front(table: Table) -> list[Integers]:
    """Every assignment that some price of a byte asks for, smallest first."""
    spread = table.loss[np.isfinite(table.loss)]
    largest, least = spread.max(initial=1e-30), spread[spread > 0].min(initial=1e-30)
    # from a price at which only bytes count to one at which only losses do
    prices = np.geomspace(largest, least / table.size.max() / len(table.units), _NUM_PRICES)
    choices = (table.at_price(float(price)) for price in prices)
    return list({table.totals(choice): choice for choice in choices}.values())


def _priced(table: Table, budget: int) -> tuple[float, Integers, float]:
    """The price at which everything just fits, the assignment at it, and the bound."""
    low, high = 0.0, 1e-30
    choice = table.at_price(low)
    loss, num_bytes = table.totals(choice)
    if num_bytes <= budget:
        return low, choice, loss
    while table.totals(table.at_price(high))[1] > budget:
        low, high = high, high * 16
    bound = 0.0
    for _ in range(120):
        middle = (low * high) ** 0.5 if low else high / 2
        choice = table.at_price(middle)
        loss, num_bytes = table.totals(choice)
        bound = max(bound, loss + middle * (num_bytes - budget))
        low, high = (middle, high) if num_bytes > budget else (low, middle)
        if high - low <= 1e-14 * high:
            break
    return high, table.at_price(high), bound


def _filled(table: Table, choice: Integers, budget: int) -> Integers:
    """Spend what is left on what lowers the loss most for its bytes."""
    choice, rows = choice.copy(), np.arange(len(table.units))
    for _ in range(_MOST_FILLED):
        left = budget - table.totals(choice)[1]
        more = table.size - table.size[rows, choice][:, None]
        less = table.loss[rows, choice][:, None] - table.loss
        fits = (less > 0) & (more <= left)
        if not fits.any():
            break
        worth = np.where(fits, less / np.maximum(more, 1e-9), -np.inf)
        unit, candidate = np.unravel_index(int(worth.argmax()), worth.shape)
        choice[unit] = candidate
    return choice


@contextlib.contextmanager
def _without_prints() -> Iterator[None]:
    """Keep off standard output what HiGHS prints of some problems whatever it is told.

    `HighsMipSolverData::transformNewIntegerFeasibleSolution`, in SciPy 1.17.
    """
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # what C has not written yet
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _solved(
    table: Table, budget: int, price: float, choice: Integers, bound: float
) -> tuple[Integers, float]:
    """Solve what is between the bound and the assignment that is known; and the better bound."""
    # takes longer to import than all other verbs do
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    known = table.totals(choice)[0]
    gap = known - bound
    if gap <= _EXACT * known:
        return choice, bound
    cost = table.loss + price * table.size
    is_open = cost - cost.min(1, keepdims=True) <= gap
    decided = np.flatnonzero(is_open.sum(1) > 1)
    units, options = np.nonzero(is_open[decided])
    if not len(units):
        return choice, bound
    size = table.size[decided[units], options]
    loss = table.loss[decided[units], options]
    fixed = table.at_price(price)
    fixed[decided] = 0
    rows = np.setdiff1d(np.arange(len(table.units)), decided)
    left = budget - float(table.size[rows, fixed[rows]].sum())
    lost = float(table.loss[rows, fixed[rows]].sum())
    once = csr_array((np.ones(len(units)), (units, np.arange(len(units)))))
    scale = size.max()
    with _without_prints():
        found = milp(
            (loss - loss.min()) / gap,
            integrality=np.ones(len(units)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(once, 1, 1),
                LinearConstraint(csr_array(size[None] / scale), -np.inf, left / scale),
            ],
            options={"time_limit": _SECONDS, "mip_rel_gap": 0.0},
        )
    if found.x is None:
        return choice, bound
    solved = fixed.copy()
    chosen = found.x > 0.5
    solved[decided[units[chosen]]] = options[chosen]
    least = lost + found.mip_dual_bound * gap + len(decided) * float(loss.min())
    made, num_bytes = table.totals(solved)
    if num_bytes <= budget and made < known:
        choice = solved
    return choice, max(bound, min(least, table.totals(choice)[0]))
