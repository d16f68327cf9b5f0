"""Turns the checked data of a preset into sources, schemes and rules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mixedprec_plugin.errors import MethodError, Problem
from mixedprec_plugin.methods.registry import bind
from mixedprec_plugin.names import PatternError, compile_pattern, nearest
from mixedprec_plugin.preset.findings import Findings
from mixedprec_plugin.preset.model import Rule, Scheme, SourceReference
from mixedprec_plugin.preset.schema import SCHEME_KEYS
from mixedprec_plugin.preset.tree import Node, Path

MODEL = "model"

_RULE_KEYS = ("match", "optional", *SCHEME_KEYS)


class Binder:
    """Binds one preset; what does not fit goes to the findings.

    Args:
        data: the merged preset, resolved. Where the schema found problems, it may hold anything;
            such parts are passed over.
        tree: the same before it was resolved, for the locations.
    """

    def __init__(self, data: Mapping[str, Any], tree: Node, findings: Findings) -> None:
        self.data = data
        self.tree = tree
        self.findings = findings
        self.used: set[str] = set()
        self.sources = self._sources()
        self.schemes = self._schemes()
        self.rules = self._rules(("rules",))
        self.draft_rules = self._rules(("draft", "rules"))

    def _sources(self) -> dict[str, SourceReference]:
        sources = {}
        for name, entry in self._mapping("sources").items():
            path: Path = ("sources", name)
            if self._is_sound(path) and isinstance(entry, dict):
                location = self.tree.locate(path)
                revision = entry.get("revision")
                sources[name] = SourceReference(name, entry["path"], revision, location)
        return sources

    def _schemes(self) -> dict[str, Scheme | None]:
        """Every scheme by its name, None where it is broken."""
        schemes: dict[str, Scheme | None] = {}
        for name, entry in self._mapping("schemes").items():
            path: Path = ("schemes", name)
            is_sound = self._is_sound(path) and isinstance(entry, dict)
            schemes[name] = self._scheme(name, entry, path, SCHEME_KEYS) if is_sound else None
        return schemes

    def _rules(self, place: Path) -> tuple[Rule, ...]:
        rules = []
        entries: Any = self.data
        for key in place:
            entries = entries.get(key) if isinstance(entries, Mapping) else None
        for index, entry in enumerate(entries if isinstance(entries, list) else []):
            path: Path = (*place, index)
            if not isinstance(entry, dict):
                continue
            patterns = self._patterns(entry.get("match"), path)
            if not self._is_sound(path):
                self._check_scheme_name(entry, path)
                continue
            scheme = self._rule_scheme(entry, path)
            if scheme is not None:
                optional = entry.get("optional", False)
                rules.append(Rule(index, patterns, scheme, optional, self.tree.locate(path)))
        return tuple(rules)

    def _patterns(self, match: Any, path: Path) -> tuple[str, ...]:
        patterns = match if isinstance(match, list) else [match]
        for index, pattern in enumerate(patterns):
            place = (*path, "match", index) if isinstance(match, list) else (*path, "match")
            if not isinstance(pattern, str) or not pattern or not self._is_sound(place):
                continue
            try:
                compile_pattern(pattern)
            except PatternError as error:
                self.findings.add(self.tree.locate(place), str(error), rule="pattern")
        return tuple(patterns)

    def _rule_scheme(self, entry: Mapping[str, Any], path: Path) -> Scheme | None:
        if "scheme" in entry:
            return self._check_scheme_name(entry, path)
        return self._scheme(entry["method"], entry, path, _RULE_KEYS)

    def _check_scheme_name(self, entry: Mapping[str, Any], path: Path) -> Scheme | None:
        name = entry.get("scheme")
        if not isinstance(name, str) or not self._is_sound((*path, "scheme")):
            return None
        self.used.add(name)
        if name not in self.schemes:
            self._unknown((*path, "scheme"), "scheme", name, list(self.schemes))
            return None
        return self.schemes[name]

    def _scheme(
        self, label: str, entry: Mapping[str, Any], path: Path, own_keys: tuple[str, ...]
    ) -> Scheme | None:
        source = entry.get("source", MODEL)
        is_known = source == MODEL or source in self._mapping("sources")
        if not is_known:
            names = [MODEL, *(name for name in self._mapping("sources") if name != MODEL)]
            self._unknown((*path, "source"), "source", source, names)
        given = {key: _whole(value) for key, value in entry.items() if key not in own_keys}
        try:
            method, arguments = bind(entry["method"], given)
        except MethodError as error:
            for problem in error.problems:
                self._refused(problem, given, path)
            return None
        requantize = entry.get("requantize", False)
        return Scheme(label, method, arguments, source, requantize) if is_known else None

    def _refused(self, problem: Problem, given: Mapping[str, Any], path: Path) -> None:
        """Pass on what the registry says, at the argument that it speaks of."""
        argument, _, rest = problem.what.partition(": ")
        if argument in given:
            place, what = (*path, argument), rest
        else:
            place, what = path, problem.what
        self.findings.add(self.tree.locate(place), what, problem.remedy, problem.rule)

    def _unknown(self, path: Path, kind: str, name: str, names: list[str]) -> None:
        near = nearest(name, names)
        remedy = f"did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
        expected = f"expected {', '.join(names)}" if names else f"the preset has no '{kind}s'"
        what = f"unknown {kind} {name!r} ({expected})"
        self.findings.add(self.tree.locate(path), what, remedy, f"unknown-{kind}")

    def _mapping(self, key: str) -> Mapping[str, Any]:
        value = self.data.get(key)
        return value if isinstance(value, dict) else {}

    def _is_sound(self, path: Path) -> bool:
        """Whether nothing at or below `path` was found wrong."""
        places = [self.tree.locate(path), *self.tree.locations(path)]
        return not any(self.findings.touches(place) for place in places)


def _whole(value: Any) -> Any:
    """Whole numbers as int: JSON Schema takes 4.0 for 4, and so does the preset."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return [_whole(item) for item in value] if isinstance(value, list) else value
