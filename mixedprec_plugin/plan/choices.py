"""What a layer would become in every method: a reader may try another one and see its bytes.

Layers that are alike share their choices, so that there are a few dozen for any model.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

from mixedprec_plugin.families.names import last_component
from mixedprec_plugin.methods.interface import Method
from mixedprec_plugin.methods.registry import AUTO, METHODS, UNQUANTIZED
from mixedprec_plugin.plan.checks import faults_of_layer, kernel_among
from mixedprec_plugin.plan.conversion import Asked, Conversions
from mixedprec_plugin.plan.model import Plan, PlannedLayer
from mixedprec_plugin.preset.model import Location, Rule, Scheme

# the rule that a choice is: what a layer becomes is asked of layers that a rule decides
_RULE = Location("", 0)


def scheme_as_dict(scheme: Scheme) -> dict[str, Any]:
    """A scheme as plain data."""
    return {
        "label": scheme.label,
        "method": scheme.method,
        "summary": scheme.summary,
        "arguments": dict(scheme.arguments),
        "source": scheme.source,
        "requantize": scheme.requantize,
        "identity": repr(scheme.identity),
    }


class Choices:
    """The methods with their arguments, and what each kind of layer would become in each."""

    def __init__(self, plan: Plan) -> None:
        self._target, self._config = plan.target, plan.source.config
        self._conversions = Conversions(plan.target, plan.source.config)
        self._schemes = {scheme.summary: (scheme, given) for scheme, given in _schemes()}
        self._by_source: dict[tuple[str, str], Scheme] = {}
        self._sets: list[list[Any]] = []
        self._known: dict[Hashable, int] = {}

    def of(self, layer: PlannedLayer, shards: Sequence[PlannedLayer]) -> int:
        """The number of a layer's list of choices, one for each method.

        Args:
            shards: the layers that share its parameter, itself among them.
        """
        key = (
            id(layer.stored), layer.source, layer.kind, last_component(layer.name),
            tuple([(s.shard in ("k", "v"), id(s.stored)) for s in shards]),
        )  # fmt: skip
        if key not in self._known:
            self._known[key] = len(self._sets)
            self._sets.append([self._choice(name, layer, shards) for name in self._schemes])
        return self._known[key]

    def as_dict(self) -> dict[str, Any]:
        """The methods, and the lists: of each [bytes, action, why not, kernel]."""
        methods = [
            {
                "summary": summary,
                "given": given,
                "identity": repr(scheme.identity),
                "rank": METHODS[scheme.method].rounding(scheme.arguments).rank,
            }
            for summary, (scheme, given) in self._schemes.items()
        ]
        return {"methods": methods, "lists": self._sets}

    def _choice(
        self, summary: str, layer: PlannedLayer, shards: Sequence[PlannedLayer]
    ) -> tuple[int, str, str, str]:
        scheme = self._from(summary, layer.source)
        rule = Rule(0, (), scheme, False, _RULE, ())
        asked = Asked(scheme, rule, layer.stored, layer.inputs, layer.kind)
        made = self._conversions.of(asked)
        tried = dataclasses.replace(layer, scheme=scheme, rule=rule, **vars(made))
        others = [dataclasses.replace(s, scheme=scheme, outputs=made.outputs) for s in shards]
        found = faults_of_layer(tried, others, self._target, self._config)
        faults = [f"{p.what}; {p.remedy}" for p in found if p.severity == "error"]
        runs_in = "" if faults else kernel_among(tried, shards, self._target, self._config)
        return made.bytes_after, made.action, next(iter(faults), ""), runs_in

    def _from(self, summary: str, source: str) -> Scheme:
        """A method's scheme that takes layers from a source; one object each."""
        scheme, _ = self._schemes[summary]
        key = summary, source
        made = dataclasses.replace(scheme, source=source, requantize=True)
        return self._by_source.setdefault(key, made)


def _schemes() -> Iterator[tuple[Scheme, dict[str, Any]]]:
    """Every method in each of its sizes, with what a preset writes for it; but for `auto`."""
    seen: set[str] = set()
    for spec in METHODS.values():
        if spec.name == AUTO:
            continue
        if spec.name == UNQUANTIZED:
            arguments = {**spec.defaults, "dtype": None}
            yield Scheme("unquantized", spec.name, arguments), {"method": "unquantized"}
            continue
        for arguments in _arguments(spec):
            scheme = Scheme(spec.name, spec.name, arguments)
            if scheme.summary not in seen:
                seen.add(scheme.summary)
                changed = {k: v for k, v in arguments.items() if v != spec.defaults[k]}
                yield scheme, {"method": spec.name, **changed}


def _arguments(spec: Method) -> Iterator[dict[str, Any]]:
    """Every combination of a method's arguments that a layer can be quantized with."""
    values = [entry.get("enum", [entry["default"]]) for entry in spec.schema.values()]
    for combination in itertools.product(*values):
        arguments = dict(zip(spec.schema, combination, strict=True))
        if not spec.conflict(arguments) and not spec.why_not_quantize(arguments):
            yield arguments
