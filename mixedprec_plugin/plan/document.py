"""The plan as one JSON document: what the page of `mixedprec plan --html` shows.

Each kind of layer stands there once, and each list of matching rules; layers are runs of these:

    layers   name template, its module's, and rows: [block, experts, runs of forms, of matches]
    forms    what layers that are alike become: shape, scheme, action, tensors, bytes, kernel, and
             the numbers of the problems that they have
    choices  what each form would become in each method: bytes, and what keeps it from that

Numbers of a name that count blocks and experts are `{}` in its template. A run is a flat list,
value and count in turns. Presentation is the page's.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Hashable, Iterable, Iterator
from typing import Any, NamedTuple

from mixedprec_plugin.errors import Problem, UsageError
from mixedprec_plugin.families.names import scheme_unit, sglang_name
from mixedprec_plugin.families.table import family_of
from mixedprec_plugin.methods.kernels import config_class
from mixedprec_plugin.plan.budget import KV_CACHE, gpu_budget
from mixedprec_plugin.plan.checks import kernel_among, with_shards
from mixedprec_plugin.plan.choices import Choices, scheme_as_dict
from mixedprec_plugin.plan.folding import unfold_names
from mixedprec_plugin.plan.memory import parts_of, rank_bytes, usual_load
from mixedprec_plugin.plan.model import Plan, PlannedLayer
from mixedprec_plugin.plan.render import totals
from mixedprec_plugin.preset.model import Scheme

FORMAT = 1
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.|$)")
# characters of a problem's place that are worth reading
_LONGEST = 300


class Place(NamedTuple):
    """Where a layer stands: its name's template, block and expert; -1 where it has none."""

    template: str
    block: int
    expert: int


def place_of(name: str) -> Place:
    """`model.layers.3.mlp.experts.7.up_proj` -> `model.layers.{}.mlp.experts.{}.up_proj`, 3, 7."""
    first = _NUMBER.search(name)
    if first is None:
        return Place(name, -1, -1)
    start, rest = f"{name[: first.start()]}{{}}", name[first.end() :]
    expert = _EXPERT.search(rest)
    if expert is None:
        return Place(start + rest, int(first[0]), -1)
    template = f"{start}{rest[: expert.start()]}{{}}{rest[expert.end() :]}"
    return Place(template, int(first[0]), int(expert[0]))


class _Table:
    """Values by number, each once."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._known: dict[Hashable, int] = {}

    def add(self, key: Hashable, value: Any = None) -> int:
        """The number of a key; `value` is kept for a new one, the key itself where it is None."""
        if key not in self._known:
            self._known[key] = len(self.values)
            self.values.append(key if value is None else value)
        return self._known[key]


def plan_document(plan: Plan) -> dict[str, Any]:
    """Return the document of a plan, plain data for JSON."""
    return _Document(plan).made()


def names_in_order(plan: Plan) -> list[str]:
    """Names of the layers in the document's order: template by template, block by block."""
    rows: dict[str, dict[int, list[str]]] = {}
    for layer in plan.layers:
        template, block, _ = place_of(layer.name)
        rows.setdefault(template, {}).setdefault(block, []).append(layer.name)
    return [name for blocks in rows.values() for names in blocks.values() for name in names]


class _Document:
    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._config = plan.source.config
        self._family = family_of(self._config)
        self._choices = Choices(plan)
        self._forms, self._schemes, self._runs, self._matches = (_Table() for _ in range(4))
        self._faults = _faults(plan)
        self._num_parts = parts_of(plan.target.tp_size, self._config)

    def made(self) -> dict[str, Any]:
        plan = self._plan
        layers = self._layers()
        return {
            "format": FORMAT,
            "model": {
                "path": plan.source.shown,
                "architecture": next(iter(self._config.get("architectures") or ()), ""),
            },
            "preset": {
                "path": plan.preset.path,
                "description": plan.preset.description,
                "on_fused_conflict": plan.preset.on_fused_conflict,
                "resolved": plan.preset.resolved,
            },
            "target": dataclasses.asdict(plan.target),
            "totals": totals(plan),
            "card": _card(plan),
            "rules": list(self._rules()),
            "sources": {name: str(source.path) for name, source in plan.sources.items()},
            "tied": dict(plan.tied),
            "schemes": self._schemes.values,
            "forms": self._forms.values,
            "choices": self._choices.as_dict(),
            "matches": self._matches.values,
            "runs": self._runs.values,
            "layers": layers,
            "problems": [self._problem(*each) for each in enumerate(plan.problems)],
        }

    def _rules(self) -> Iterator[dict[str, Any]]:
        for rule in self._plan.preset.rules:
            yield {
                "patterns": rule.shown,
                "scheme": self._scheme(rule.scheme),
                "where": f"{rule.location.file}:{rule.location.line}",
                "optional": rule.optional,
            }

    def _scheme(self, scheme: Scheme) -> int:
        key = (scheme.label, scheme.identity, scheme.source, scheme.requantize)
        return self._schemes.add(key, scheme_as_dict(scheme))

    def _layers(self) -> list[dict[str, Any]]:
        rules: dict[str, list[int]] = {}
        for index, names in self._plan.matches.matched.items():
            for name in names:
                rules.setdefault(name, []).append(index)
        numbers: dict[Hashable, int] = {}
        templates: dict[str, dict[str, Any]] = {}
        rows: dict[str, dict[int, list[tuple[int, int, int]]]] = {}
        for layer, shards, alike in with_shards(self._plan.layers):
            faults = self._faults.get(layer.name, ())
            # layers without a stored format are alike in what they serve
            outputs = None if layer.stored else tuple(layer.outputs.items())
            key = (alike, layer.source, layer.note, faults, outputs)
            if key not in numbers:
                form = self._form(layer, shards, faults)
                # each rule of its own scheme has one
                numbers[key] = self._forms.add(json.dumps(form), form)
            template, block, expert = place_of(layer.name)
            if template not in templates:
                module = place_of(layer.module).template
                templates[template] = {
                    "name": template,
                    "module": module,
                    "sglang": sglang_name(module, self._family),
                    "kind": layer.kind,
                }
            match = self._matches.add(tuple(rules.get(layer.name, ())))
            row = rows.setdefault(template, {}).setdefault(block, [])
            row.append((expert, numbers[key], match))
        return [
            {**made, "rows": [self._row(block, row) for block, row in rows[name].items()]}
            for name, made in templates.items()
        ]

    def _row(self, block: int, row: list[tuple[int, int, int]]) -> list[Any]:
        """A block's layers; its experts as their number where they count from 0, 0 for none."""
        experts = [expert for expert, _, _ in row]
        is_counted = experts == list(range(len(experts)))
        told = 0 if experts == [-1] else len(experts) if is_counted else experts
        forms = self._runs.add(tuple(runs_of(form for _, form, _ in row)))
        matches = self._runs.add(tuple(runs_of(match for _, _, match in row)))
        return [block, told, forms, matches]

    def _form(self, layer: PlannedLayer, shards: Any, faults: tuple[int, ...]) -> dict[str, Any]:
        stored, scheme, target = layer.stored, layer.scheme, self._plan.target
        runs_as, runs_in, choices = "", "", None
        if stored is not None and scheme is not None:
            runs_as = config_class(scheme.method, target)
            choices = self._choices.of(layer, shards)
            if all(self._plan.problems[n].severity != "error" for n in faults):
                runs_in = kernel_among(layer, shards, target, self._config)
        return {
            "kind": layer.kind,
            "scheme": scheme and self._scheme(scheme),
            "source": layer.source,
            "stored": stored.description if stored else "",
            "action": layer.action,
            "note": layer.notes,
            "shape": [stored.N, stored.K] if stored else None,
            "tensors": {s: [spec.dtype, *spec.shape] for s, spec in layer.outputs.items()},
            "bytes_before": layer.bytes_before,
            "bytes": layer.bytes_after,
            "parts": self._num_parts(layer),
            "class": runs_as,
            "kernel": runs_in,
            "choices": choices,
            "problems": faults,
        }

    def _problem(self, number: int, problem: Problem) -> dict[str, Any]:
        """A problem, the rules whose places it names, and of how many layers it is."""
        where = problem.where
        if len(where) > _LONGEST:
            where = f"{where[:_LONGEST].rpartition(', ')[0] or where[:_LONGEST]}, …"
        return {
            **dataclasses.asdict(problem),
            "where": where,
            "rules": [r.index for r in self._plan.preset.rules if problem.where == str(r.location)],
            "layers": sum(number in numbers for numbers in self._faults.values()),
        }


def _faults(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Layer name -> the numbers of the problems that name it, its module or its expert."""
    units: dict[str, list[str]] = {}
    for layer in plan.layers:
        for unit in {layer.name, layer.module, scheme_unit(layer.module, layer.shard)}:
            units.setdefault(unit, []).append(layer.name)
    found: dict[str, dict[int, None]] = {}
    for number, problem in enumerate(plan.problems):
        for unit in unfold_names(problem.where, len(plan.layers)):
            for name in units.get(unit, ()):
                found.setdefault(name, {})[number] = None
    return {name: tuple(numbers) for name, numbers in found.items()}


def _card(plan: Plan) -> dict[str, Any] | None:
    """What the GPU of a rank holds, as lines of `budget`, the KV cache by the token.

    None where no GPU is named; with "unknown" for what is not told.
    """
    target, config = plan.target, plan.source.config
    if target.gpu is None:
        return None
    weights = rank_bytes(plan.layers, target.tp_size, config)
    try:
        load = dataclasses.replace(usual_load(plan.preset), context=1)
        budget = gpu_budget(target.gpu, target.tp_size, config, load)
    except UsageError as error:
        return {"weights": weights, "unknown": error.problems[0].what}
    cache = next(line for line in budget.taken if line.title == KV_CACHE)
    taken = [line._asdict() for line in budget.taken if line.title != KV_CACHE]
    return {
        "weights": weights,
        "memory": budget.memory.num_bytes,
        "taken": taken,
        "token_bytes": cache.num_bytes,
        "token_formula": cache.formula,
    }


def runs_of(values: Iterable[int]) -> list[int]:
    """`3, 3, 5` -> `[3, 2, 5, 1]`: each value and how often it comes in a row."""
    return [x for value, run in itertools.groupby(values) for x in (value, len(list(run)))]
