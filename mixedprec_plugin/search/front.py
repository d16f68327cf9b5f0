"""Every budget at once, and where named presets and sources stand beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from mixedprec_plugin.errors import MixedPrecisionError
from mixedprec_plugin.plan.model import Plan, PlannedLayer
from mixedprec_plugin.plan.resolve import resolve_plan
from mixedprec_plugin.preset.load import load_preset
from mixedprec_plugin.resources import preset_names
from mixedprec_plugin.search.allocate import Table, front
from mixedprec_plugin.search.candidates import AS_STORED, Choices, Option
from mixedprec_plugin.search.kept import Scores


@dataclasses.dataclass(frozen=True)
class Point:
    """One preset.

    Attributes:
        name: of the preset or the source; empty for points of the front.
        bits: a weight of linear layers, scales counted.
        rank_bytes: of all that one rank holds.
        loss: what it is predicted to cost.
    """

    name: str
    bits: float
    rank_bytes: int
    loss: float


def point_of(name: str, choices: Choices, choice: Mapping[str, str], scores: Scores) -> Point:
    """Where an assignment of all units stands."""
    options = [choices.units[unit].options[candidate] for unit, candidate in choice.items()]
    return Point(
        name,
        8 * sum(option.num_bytes for option in options) / choices.num_weights,
        sum(option.rank_bytes for option in options) + choices.rest[1],
        sum(loss_of(scores, unit, candidate) for unit, candidate in choice.items()),
    )


def loss_of(scores: Scores, unit: str, candidate: str) -> float:
    """What a candidate costs a unit: nothing, where it stays as it is."""
    return 0.0 if candidate == AS_STORED else scores[unit][candidate]


def front_points(choices: Choices, total: Table, ranks: Table) -> list[Point]:
    """The front, smallest first, of tables in bytes over all ranks and of one rank."""
    found = []
    for made in front(total):
        loss, num_bytes = total.totals(made)
        held = ranks.totals(made)[1] + choices.rest[1]
        found.append(Point("", 8 * num_bytes / choices.num_weights, held, loss))
    return found


def named_points(choices: Choices, scores: Scores) -> list[Point]:
    """Presets that ship and that serve this model, and each source as it is.

    Those with a scheme that was not scored are left out.
    """
    found = []
    base = choices.base
    for name in preset_names():
        try:
            plan = resolve_plan(load_preset(name), base.source, base.target)
        except MixedPrecisionError:
            continue  # made for sources that are not here
        choice = {} if plan.errors else _choice(plan, choices)
        found += [point_of(name, choices, choice, scores)] if choice else []
    for name, candidate in choices.candidates.items():
        is_whole = all(name in unit.options for unit in choices.units.values())
        if candidate.scheme.source != "model" and is_whole:
            found.append(point_of(name, choices, dict.fromkeys(choices.units, name), scores))
    return found


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
