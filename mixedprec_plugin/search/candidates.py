"""What each unit of a model could run as.

A unit is what needs one scheme: a fused module, a single layer or one expert. Each candidate is a
scheme for all of them, planned like any preset, so that what a plan refuses is no option.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

from mixedprec_plugin.checkpoint.source import Source
from mixedprec_plugin.errors import Problem, UsageError
from mixedprec_plugin.families.names import last_component, scheme_unit
from mixedprec_plugin.families.table import family_of
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.methods.registry import AUTO, METHODS, bind, method_names, suggest_method
from mixedprec_plugin.names import without_numbers
from mixedprec_plugin.plan.auto import by_method
from mixedprec_plugin.plan.checks import layer_faults
from mixedprec_plugin.plan.memory import bytes_by_layer
from mixedprec_plugin.plan.model import Plan, PlannedLayer
from mixedprec_plugin.plan.resolve import resolve_plan
from mixedprec_plugin.preset.load import load_resolved
from mixedprec_plugin.preset.model import Location, Preset, Rule, Scheme, SourceReference

AS_STORED = "as stored"
# source name -> how a preset names it, and what it holds
Others = Mapping[str, tuple[SourceReference, Source]]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A scheme to try, by the name that presets and tables call it by, `awq-4bit-g64`."""

    name: str
    scheme: Scheme

    @property
    def needs_conversion(self) -> bool:
        """Whether only a conversion rounds so."""
        return self.scheme.arguments.get("rounding") == "calibrated"


@dataclasses.dataclass(frozen=True)
class Option:
    """One candidate for one unit.

    Attributes:
        own: the unit's layers as they are stored.
        planned: as the candidate plans them, or layers that are like them.
        num_bytes: over all ranks.
        rank_bytes: of one rank.
    """

    candidate: Candidate
    own: tuple[PlannedLayer, ...]
    planned: tuple[PlannedLayer, ...]
    num_bytes: int
    rank_bytes: int

    @property
    def layers(self) -> tuple[PlannedLayer, ...]:
        """The unit's layers as the candidate plans them."""
        if self.own[0].name == self.planned[0].name:
            return self.planned
        alike = ("scheme", "rule", "action", "outputs", "bytes_after")
        return tuple(
            dataclasses.replace(own, **{key: getattr(like, key) for key in alike})
            for own, like in zip(self.own, self.planned, strict=True)
        )


@dataclasses.dataclass(frozen=True)
class Unit:
    """What needs one scheme.

    Attributes:
        name: of the fused module, the layer, or the expert.
        layers: as the model's own checkpoint stores them.
        options: candidate name -> option; with `AS_STORED`, which costs nothing in quality.
    """

    name: str
    layers: tuple[PlannedLayer, ...]
    options: Mapping[str, Option]

    @property
    def num_weights(self) -> int:
        return sum(layer.num_weights for layer in self.layers)


@dataclasses.dataclass(frozen=True)
class Choices:
    """The units of a model with all that they could run as.

    Attributes:
        base: the model as its own checkpoint stores it.
        units: unit name -> unit.
        candidates: candidate name -> candidate.
        others: further sources, by name.
        apart: those that cannot be mixed with the model, and why; they are no candidates.
    """

    base: Plan
    units: Mapping[str, Unit]
    candidates: Mapping[str, Candidate]
    others: Others = dataclasses.field(default_factory=dict)
    apart: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def rest(self) -> tuple[int, int]:
        """Bytes of what is in no unit, over all ranks and of one rank."""
        own = {layer.name for unit in self.units.values() for layer in unit.layers}
        others = [layer for layer in self.base.layers if layer.name not in own]
        ranks = bytes_by_layer(others, self.base.target.tp_size, self.base.source.config)
        return sum(layer.bytes_after for layer in others), sum(ranks)

    @property
    def num_weights(self) -> int:
        return sum(unit.num_weights for unit in self.units.values())


def find_choices(
    model: Source,
    target: Target,
    methods: Collection[str] = (),
    others: Others = MappingProxyType({}),
) -> Choices:
    """Plan every candidate.

    Args:
        methods: canonical names of those to try; all if empty.
        others: further sources.
    Raises:
        UsageError: a method is not known, or nothing is to choose.
    """
    stored = Scheme(AS_STORED, *bind(AUTO, {}))
    base = resolve_plan(_preset(stored), model, target)
    units = _units(base)
    alike = _alike(units)
    apart, beside = {}, {}
    for name, (reference, source) in others.items():
        plans = _beside(base, units, name, reference, source)
        beside[name] = plans[0]
        wrong = [p for plan in plans for p in plan.errors if p.rule in _APART]
        if wrong:
            apart[name] = str(wrong[0])
    mixed = [name for name in beside if name not in apart]
    taken = [Candidate(x, Scheme(x, *bind(AUTO, {}), source=x)) for x in mixed]
    candidates = [*_of_methods(methods), *taken]
    kept = Candidate(AS_STORED, stored)
    options = {name: {AS_STORED: _option(kept, own, base)} for name, own in units.items()}
    few = _only(model, [units[names[0]] for names in alike])
    for candidate in candidates:
        scheme = candidate.scheme
        is_own = scheme.source not in beside
        plan = resolve_plan(_preset(scheme), few, target) if is_own else beside[scheme.source]
        served = _served(candidate, plan)
        for names in alike if is_own else ([name] for name in units):
            if planned := served.get(names[0]):
                one = _option(candidate, planned, plan)
                for name in names:
                    own = units[name] if is_own else planned
                    options[name][candidate.name] = dataclasses.replace(one, own=own)
    found = {name: Unit(name, units[name], own) for name, own in options.items() if len(own) > 1}
    if not found:
        where, which = ("--methods", "none of these") if methods else ("--model", "no method")
        ranks = f" on {target.tp_size} ranks" if target.tp_size > 1 else ""
        what = f"{which} serves a layer of {model.path}{ranks}"
        remedy = "see why with mixedprec plan, or change --tp or --gpu"
        raise UsageError(Problem(where, what, remedy, "search"))
    used = {name for unit in found.values() for name in unit.options}
    by_name = {c.name: c for c in candidates if c.name in used}
    return Choices(base, found, {AS_STORED: kept, **by_name}, others, apart)


def canonical_methods(names: Iterable[str]) -> tuple[str, ...]:
    """Methods by the names that people type; an error, if one is not known or quantizes nothing."""
    found = []
    for name in names:
        method = next((m for m in METHODS.values() if name in m.names and m.searched), None)
        if method is None:
            known = ", ".join(m.name for m in METHODS.values() if m.searched)
            listed = "quantizes nothing" if name in method_names() else "is not known"
            remedy = suggest_method(name) if listed == "is not known" else ""
            raise UsageError(Problem("--methods", f"{name!r} {listed} (expected {known})", remedy))
        found.append(method.name)
    return tuple(dict.fromkeys(found))


def _of_methods(methods: Collection[str]) -> Iterator[Candidate]:
    for method in METHODS.values():
        if methods and method.name not in methods:
            continue
        for settings in method.searched:
            roundings = method.schema.get("rounding", {}).get("enum", [None])
            for rounding in roundings:
                given = {**settings, **({"rounding": rounding} if rounding else {})}
                name, arguments = bind(method.name, given)
                if not method.why_not_quantize(arguments):
                    scheme = Scheme("", name, arguments)
                    words = scheme.summary.replace("-bit", "bit").split()
                    label = "-".join(words) + ("-nearest" if rounding == "nearest" else "")
                    scheme = dataclasses.replace(scheme, label=label, requantize=True)
                    yield Candidate(label, scheme)


# what is wrong of a source that cannot be mixed with the model
_APART = ("coupled-layers", "source-model")


def _beside(
    base: Plan, units: Mapping[str, Sequence[PlannedLayer]], name: str, reference: SourceReference,
    source: Source,
) -> list[Plan]:  # fmt: skip
    """Plan a source's layers beside the model's own norms, and beside the layers in front of them.

    A tool may have folded scales into either: what can make up for that is planned to, and what
    cannot is an error.
    """
    own, other = Scheme(AS_STORED, *bind(AUTO, {})), Scheme(name, *bind(AUTO, {}), source=name)
    lasts = {last_component(layer.name) for layers in units.values() for layer in layers}
    behind = lasts & family_of(base.source.config).outputs
    norms = {last_component(layer.name) for layer in base.layers if layer.kind == "norm"} - lasts
    plans = []
    for taken in filter(None, (lasts, behind)):
        asked = [({"*"}, own), ({f"*.{x}" for x in taken}, other), ({f"*{x}" for x in norms}, own)]
        rules = tuple(
            Rule(index, tuple(sorted(found)), scheme, True, Location(name, 0), tuple(sorted(found)))
            for index, (found, scheme) in enumerate(asked)
            if found
        )
        preset = dataclasses.replace(_EMPTY, path=name, rules=rules, sources={name: reference})
        plans.append(resolve_plan(preset, base.source, base.target, {name: source}))
    return plans


def _preset(scheme: Scheme) -> Preset:
    """A preset that asks one scheme of everything."""
    rule = Rule(0, ("*",), scheme, False, Location(scheme.label, 0), ("*",))
    return dataclasses.replace(_EMPTY, path=scheme.label, rules=(rule,))


_EMPTY = load_resolved({"version": 1, "rules": [{"match": "*", "method": AUTO}]}, "search")


def _units(plan: Plan) -> dict[str, tuple[PlannedLayer, ...]]:
    found: dict[str, list[PlannedLayer]] = {}
    for layers in plan.modules.values():
        for layer in layers:
            if layer.kind in ("linear", "expert") and layer.num_weights:
                found.setdefault(scheme_unit(layer.module, layer.shard), []).append(layer)
    return {name: tuple(layers) for name, layers in found.items()}


def _alike(units: Mapping[str, Sequence[PlannedLayer]]) -> list[list[str]]:
    """Names of units that differ in numbers of their names alone, and are stored alike."""
    found: dict[object, list[str]] = {}
    for name, layers in units.items():
        key = (without_numbers(name), *((id(x.stored), x.action) for x in layers))
        found.setdefault(key, []).append(name)
    return list(found.values())


def _only(model: Source, units: Iterable[Sequence[PlannedLayer]]) -> Source:
    """A checkpoint with nothing but some layers, whose plan takes no time."""
    kept = {layer.name for layers in units for layer in layers}
    found = dataclasses.replace(model)
    # cached, and by far the most of it
    vars(found)["layers"] = {name: own for name, own in model.layers.items() if name in kept}
    return found


def _served(candidate: Candidate, plan: Plan) -> dict[str, tuple[PlannedLayer, ...]]:
    """The units that a candidate's plan serves."""
    faults = layer_faults(plan.layers, plan.target, plan.source.config)
    errors = [names for fault, names in faults.items() if fault.severity == "error"]
    wrong = set[str]().union(*errors)
    return {
        unit: layers
        for unit, layers in _units(plan).items()
        if all(
            layer.scheme is not None
            and layer.source == candidate.scheme.source
            and layer.name not in wrong
            and layer.action in ("quantize", "requantize", "as stored", "cast", "repack")
            and layer.stored is not None
            and layer.stored.is_readable
            for layer in layers
        )
    }


def _option(candidate: Candidate, layers: tuple[PlannedLayer, ...], plan: Plan) -> Option:
    ranks = bytes_by_layer(layers, plan.target.tp_size, plan.source.config)
    total = sum(layer.bytes_after for layer in layers)
    planned = tuple(by_method(layer, plan.target) for layer in layers)
    return Option(candidate, layers, planned, total, sum(ranks))
