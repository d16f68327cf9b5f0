"""Model and budget -> the preset: candidates, their scores, the allocation, what is beside it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Literal

from mixedprec_plugin.errors import MixedPrecisionError, PlanError, Problem
from mixedprec_plugin.families.names import ExpertShard
from mixedprec_plugin.plan.auto import is_bound
from mixedprec_plugin.plan.model import Plan, PlannedLayer
from mixedprec_plugin.plan.resolve import resolve_plan
from mixedprec_plugin.preset.load import load_preset
from mixedprec_plugin.resources import preset_names
from mixedprec_plugin.search.allocate import (
    TOLERANCE,
    Allocation,
    Table,
    front,
    with_fewest_schemes,
)
from mixedprec_plugin.search.candidates import AS_STORED, Choices, Option, Unit
from mixedprec_plugin.search.kept import KeptScores, Scores, Wanted
from mixedprec_plugin.search.rule import worth_trying

if TYPE_CHECKING:
    from rich.progress import Progress

# of more, planning every preset that ships would take longer than the search
_MOST_UNITS_BESIDE = 2000

Kind = Literal["nats", "measured", "shares", "parts", "guesses"]


@dataclasses.dataclass(frozen=True)
class Way:
    """How scores are made.

    Attributes:
        kind: what they are: nats a token, predicted or measured; shares of outputs that are error,
            parts of the residual stream that are, or guesses.
        score: makes those that are wanted, a few at a time.
        without: units that it cannot score, which stay as they are stored, and why.
        can_score: whether it can score a unit's candidate.
        scored_on: what the scores stand on, where that is no text.
    """

    kind: Kind
    score: Callable[[Wanted, Progress], Iterator[Scores]] = lambda _wanted, _progress: iter(())
    without: Mapping[str, str] = dataclasses.field(default_factory=dict)
    can_score: Callable[[Unit, str], bool] = lambda _unit, _name: True
    scored_on: str = ""


GUESSES = Way("guesses")


@dataclasses.dataclass(frozen=True)
class Budget:
    """Bytes of weights on a rank, everything counted, or else bits a weight of linear layers.

    Attributes:
        share: of what the user named, which such bytes are.
    """

    num_bytes: int | None = None
    bits: float = 0.0
    share: float = 1.0


@dataclasses.dataclass(frozen=True)
class Point:
    """Where a preset or source stands, or an unnamed point of the front; bytes are of one rank."""

    name: str
    bits: float
    rank_bytes: int
    loss: float


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        choices: the units that were scored, with what was.
        allocation: the candidate of each unit, or of each layer of experts.
        choice: the candidate of each unit.
        num_made: how many scores were made, and not read.
        tables: what there was to choose from, in bytes over all ranks and of one rank.
    """

    choices: Choices
    way: Way
    scores: Scores
    allocation: Allocation
    choice: Mapping[str, str]
    num_made: int
    tables: tuple[Table, Table]

    @property
    def point(self) -> Point:
        """Where the choice stands."""
        return self._point("", self.choice)

    @functools.cached_property
    def front(self) -> list[Point]:
        """The best for other budgets, smallest first."""
        found = []
        total, ranks = self.tables
        for made in front(total):
            loss, num_bytes = total.totals(made)
            held = ranks.totals(made)[1] + self.choices.rest[1]
            found.append(Point("", 8 * num_bytes / self.choices.num_weights, held, loss))
        return found

    @functools.cached_property
    def named(self) -> list[Point]:
        """Presets that ship and that serve this model, and each source as it is.

        Those with a scheme that was not scored are left out.
        """
        found, choices = [], self.choices
        if len(choices.units) > _MOST_UNITS_BESIDE:
            return []
        for name in preset_names():
            try:
                plan = resolve_plan(load_preset(name), choices.base.source, choices.base.target)
            except MixedPrecisionError:
                continue  # made for sources that are not here
            choice = {} if plan.errors else _choice(plan, choices)
            found += [self._point(name, choice)] if choice else []
        for name in choices.others:
            if all(name in unit.options for unit in choices.units.values()):
                found.append(self._point(name, dict.fromkeys(choices.units, name)))
        return found

    def _point(self, name: str, choice: Mapping[str, str]) -> Point:
        """Where an assignment of all units stands."""
        options = [self.choices.units[unit].options[x] for unit, x in choice.items()]
        return Point(
            name,
            8 * sum(option.num_bytes for option in options) / self.choices.num_weights,
            sum(option.rank_bytes for option in options) + self.choices.rest[1],
            sum(loss_of(self.scores, unit, x) for unit, x in choice.items()),
        )

    @functools.cached_property
    def losses(self) -> dict[str, float]:
        """What each unit loses."""
        return {unit: loss_of(self.scores, unit, name) for unit, name in self.choice.items()}


@dataclasses.dataclass(frozen=True)
class Search:
    """A search over the units of one model.

    Attributes:
        at_load: whether only what needs no conversion may be chosen.
        is_by_layer: whether all experts of a layer run alike.
        tolerance: by which share the loss may rise for fewer schemes.
    """

    choices: Choices
    at_load: bool = False
    is_by_layer: bool = False
    tolerance: float = TOLERANCE

    @property
    def unscored(self) -> Scores:
        """Every option at no loss: what `check` and `smallest` go by before any is scored."""
        found: Scores = {}
        for name, unit in self.choices.units.items():
            for key, option in unit.options.items():
                if key != AS_STORED and self._is_allowed(option):
                    found.setdefault(name, {})[key] = 0.0
        return found

    def check(self, budget: Budget, scores: Scores) -> tuple[Choices, Table, Table, Table, int]:
        """See that something is within a budget; a PlanError, where nothing is so small.

        Returns:
            the units that have scores; the tables of all bytes and of a rank's, the one of the two
            that the budget is of, and its limit.
        """
        scored = _scored(self.choices, scores)
        total, ranks = (self._table(scored, scores, is_rank=x) for x in (False, True))
        table, limit = ranks, (budget.num_bytes or 0) - scored.rest[1]
        if budget.num_bytes is None:
            # what was not scored stays as it is, and is in no unit here
            table, limit = total, int(budget.bits * scored.num_weights / 8)
        if table.smallest > limit:
            raise _too_small(budget, scored, table)
        return scored, total, ranks, table, limit

    def run(self, budget: Budget, scores: Scores, way: Way, num_made: int = 0) -> Found:
        """Choose; a PlanError, where nothing is so small."""
        scored, total, ranks, table, limit = self.check(budget, scores)
        allocation = with_fewest_schemes(table, limit, {AS_STORED}, self.tolerance)
        groups = self._groups(scored.units)
        choice = {unit: allocation.choice[groups[unit]] for unit in scored.units}
        return Found(scored, way, scores, allocation, choice, num_made, (total, ranks))

    def smallest(self, scores: Scores) -> int:
        """Bytes of a rank, everything counted, that nothing is smaller than."""
        scored = _scored(self.choices, scores)
        return self._table(scored, scores, is_rank=True).smallest + scored.rest[1]

    def _groups(self, units: Mapping[str, Unit]) -> dict[str, str]:
        return {
            name: unit.layers[0].module
            if self.is_by_layer and isinstance(unit.layers[0].shard, ExpertShard)
            else name
            for name, unit in units.items()
        }

    def _table(self, choices: Choices, scores: Scores, *, is_rank: bool) -> Table:
        loss: dict[str, dict[str, float]] = {}
        size: dict[str, dict[str, int]] = {}
        for name, unit in choices.units.items():
            own = {x: option for x, option in unit.options.items() if self._is_allowed(option)}
            loss[name] = {x: loss_of(scores, name, x) for x in own}
            size[name] = {x: o.rank_bytes if is_rank else o.num_bytes for x, o in own.items()}
        return Table.of(loss, size).together(self._groups(choices.units))

    def _is_allowed(self, option: Option) -> bool:
        if self.at_load and option.candidate.needs_conversion:
            return False
        return self.is_by_layer or not is_bound(option.planned[0])


def find_scores(
    choices: Choices, kept: KeptScores, way: Way, progress: Progress, *, at_load: bool
) -> tuple[Scores, int]:
    """Read scores, make those that may be chosen and are not there, and tell how many were made.

    Raises:
        CheckpointError, UsageError, ServerError: as the way to make them says.
        ConvertError: the scores cannot be written.
    """
    known = kept.read()
    missing = {}
    for unit in choices.units.values():
        names = [
            x
            for x in worth_trying(unit)
            if x not in known.get(unit.name, {})
            and not (at_load and choices.candidates[x].needs_conversion)
            and way.can_score(unit, x)
        ]
        if names and unit.name not in way.without:
            missing[unit.name] = names
    if missing:
        for made in way.score(missing, progress):
            kept.write(made)
        known = kept.read()
    return known, sum(map(len, missing.values()))


def _scored(choices: Choices, scores: Scores) -> Choices:
    """The units that have scores, with those options that have one."""
    units = {}
    for name, unit in choices.units.items():
        if name in scores:
            known = (AS_STORED, *scores[name])
            options = {k: v for k, v in unit.options.items() if k in known}
            units[name] = dataclasses.replace(unit, options=options)
    return dataclasses.replace(choices, units=units)


def _too_small(budget: Budget, choices: Choices, table: Table) -> PlanError:
    """The error of a budget that nothing is within, with the nearest that is."""
    if budget.num_bytes is None:
        nearest = 8 * table.smallest / choices.num_weights
        what = f"{budget.bits:g} bits a weight of linear layers is less than anything takes"
        where, expected = "--bits", f"(expected {nearest + 0.005:.2f} or more)"
        remedy = "allow more, or name more --methods"
    else:
        unit = budget.share * 2**30
        size = (table.smallest + choices.rest[1]) / unit
        what = f"{budget.num_bytes / unit:.2f} GiB a rank is less than anything takes"
        where, expected = "--budget", f"(expected {size + 0.005:.2f}GiB or more)"
        remedy = "allow more, name more --methods, or more ranks with --tp"
    return PlanError(Problem(where, f"{what} {expected}", remedy, "budget"))


def loss_of(scores: Scores, unit: str, candidate: str) -> float:
    """What a candidate costs a unit: nothing, where it stays as it is."""
    return 0.0 if candidate == AS_STORED else scores[unit][candidate]


def _choice(plan: Plan, choices: Choices) -> dict[str, str]:
    """The candidates that a plan's units run in; empty if one is none of them."""
    found = {}
    for name, unit in choices.units.items():
        candidate = _candidate(plan.by_name[unit.layers[0].name], unit.options)
        if candidate is None:
            return {}
        found[name] = candidate
    return found


def _candidate(layer: PlannedLayer, options: Mapping[str, Option]) -> str | None:
    assert layer.scheme is not None
    wanted = layer.scheme.identity, layer.scheme.arguments.get("rounding")
    for name, option in options.items():
        own = option.candidate.scheme
        if name != AS_STORED and wanted == (own.identity, own.arguments.get("rounding")):
            return name
    return AS_STORED if layer.action == "as stored" else None
