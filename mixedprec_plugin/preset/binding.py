"""Turns the checked data of a preset into sources, schemes and rules."""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Mapping
from pathlib import Path as FilePath
from typing import Any

from mixedprec_plugin.checkpoint.hub import is_id
from mixedprec_plugin.errors import MethodError
from mixedprec_plugin.methods.registry import bind
from mixedprec_plugin.names import MAX_ALTERNATIVES, PatternError, compile_pattern, num_in_ranges
from mixedprec_plugin.preset.document import Document, Path, at
from mixedprec_plugin.preset.model import KvCache, Location, Rule, Scheme, SourceReference
from mixedprec_plugin.preset.schema import SCHEME_KEYS

MODEL = "model"
# in place of the source of scales
NONE = "none"
CALIBRATE = "calibrate"

# keys of a rule or a scheme that are no arguments of its method
_OTHER_KEYS = ("match", "optional", *SCHEME_KEYS)
_NUM_SHOWN = 20
MAX_NUMBERS = 500_000


class Binder:
    """Binds one preset, and reports what does not fit.

    Args:
        data: the merged preset, resolved. Where the schema found problems, it may hold anything;
            such parts are passed over.
        shown: the same as messages may show it.
        document: the same before it was resolved, for the places.
    """

    def __init__(self, data: dict[str, Any], shown: Any, document: Document) -> None:
        self.data = data
        self.shown = shown
        self.document = document
        self.used: set[str] = set()
        self._num_numbers = 0
        self.sources = self._sources()
        self.schemes = self._schemes()
        self.rules = self._rules(("rules",))
        self.draft_rules = self._rules(("draft", "rules"))
        self.kv_cache = self._kv_cache()

    def _sources(self) -> dict[str, SourceReference]:
        sources = {}
        for name, entry in self._mapping("sources").items():
            path: Path = ("sources", name)
            if isinstance(entry, dict) and self.document.is_sound(path):
                place, shown = self.document.locate(path), at(self.shown, path)
                written_in = self.document.locate((*path, "path"))
                sources[name] = SourceReference(
                    name, _beside(entry["path"], written_in, entry["path"]),
                    entry.get("revision"), place,
                    _beside(shown["path"], written_in, entry["path"]), shown.get("revision"),
                )  # fmt: skip
        return sources

    def _kv_cache(self) -> KvCache:
        said, path = self._mapping("kv_cache"), ("kv_cache", "scales")
        scales = said.get("scales")
        names = [MODEL, *self._mapping("sources"), NONE, CALIBRATE]
        if scales is not None and self.document.is_sound(path) and scales not in names:
            self._unknown(path, "source", names)
            scales = None
        source = "" if scales in (NONE, CALIBRATE) else scales
        return KvCache(said.get("dtype", "auto"), source, scales == CALIBRATE)

    def _schemes(self) -> dict[str, Scheme | None]:
        """Every scheme by its name, None where it is broken."""
        entries = self._mapping("schemes").items()
        return {name: self._scheme(name, entry, ("schemes", name)) for name, entry in entries}

    def _rules(self, place: Path) -> tuple[Rule, ...]:
        rules = []
        entries = at(self.data, place)
        for index, entry in enumerate(entries if isinstance(entries, list) else []):
            path: Path = (*place, index)
            if not isinstance(entry, dict):
                continue
            patterns = self._patterns(entry, path)
            if "scheme" in entry:
                scheme = self._named_scheme(entry["scheme"], (*path, "scheme"))
            else:
                scheme = self._scheme(entry.get("method", ""), entry, path)
            if scheme and self.document.is_sound(path):
                optional = entry.get("optional", False)
                shown = _listed(at(self.shown, (*path, "match")))
                where = self.document.locate(path)
                rules.append(Rule(index, patterns, scheme, optional, where, shown))
        return tuple(rules)

    def _patterns(self, entry: Mapping[str, Any], path: Path) -> tuple[str, ...]:
        match = entry.get("match")
        for index, pattern in enumerate(_listed(match)):
            place = (*path, "match", index) if isinstance(match, list) else (*path, "match")
            if not isinstance(pattern, str) or not pattern or not self.document.is_sound(place):
                continue
            if self._num_numbers > MAX_NUMBERS:
                break
            self._num_numbers += min(num_in_ranges(pattern), MAX_ALTERNATIVES)
            try:
                compile_pattern(pattern)
            except PatternError as error:
                shown = at(self.shown, place)
                what = str(error) if shown == pattern else f"{shown!r} stands for no pattern"
                self.document.report(place, what, rule="pattern")
            if self._num_numbers > MAX_NUMBERS:
                what = f"the ranges up to here list more than {MAX_NUMBERS} numbers"
                self.document.report(place, what, "write '*' or shorter ranges", "pattern")
        return _listed(match)

    def _named_scheme(self, name: Any, path: Path) -> Scheme | None:
        if not isinstance(name, str) or not self.document.is_sound(path):
            return None
        self.used.add(name)
        if name not in self.schemes:
            self._unknown(path, "scheme", self.schemes)
        return self.schemes.get(name)

    def _scheme(self, label: str, entry: Any, path: Path) -> Scheme | None:
        if not isinstance(entry, dict) or not self.document.is_sound(path):
            return None
        source = entry.get("source", MODEL)
        names = list(dict.fromkeys([MODEL, *self._mapping("sources")]))
        if source not in names:
            self._unknown((*path, "source"), "source", names)
        given = {key: _whole(value) for key, value in entry.items() if key not in _OTHER_KEYS}
        try:
            method, arguments = bind(entry["method"], given)
        except MethodError as error:
            for problem in error.problems:
                argument, _, rest = problem.what.partition(": ")
                is_named = argument in given
                place, what = ((*path, argument), rest) if is_named else (path, problem.what)
                self.document.report(place, what, problem.remedy, problem.rule)
            return None
        requantize = entry.get("requantize", False)
        return Scheme(label, method, arguments, source, requantize) if source in names else None

    def _unknown(self, path: Path, kind: str, names: Collection[str]) -> None:
        name = at(self.shown, path)
        more = f", … {len(names)} in all" if len(names) > _NUM_SHOWN else ""
        expected = f"expected {', '.join(itertools.islice(names, _NUM_SHOWN))}{more}"
        expected = expected if names else f"the preset has no '{kind}s'"
        what = f"unknown {kind} {name!r} ({expected})"
        remedy = self.document.findings.suggest(name, names)
        self.document.report(path, what, remedy, f"unknown-{kind}")

    def _mapping(self, key: str) -> Mapping[str, Any]:
        value = self.data.get(key)
        return value if isinstance(value, dict) else {}


def _beside(text: str, place: Location, path: str) -> str:
    """A source's path, or how it is shown, from its preset's folder; an id of the Hub as it is.

    What was not written in a file counts from the working directory.
    """
    folder = FilePath(place.file).parent
    is_there = (folder / path).exists() or FilePath(path).exists()
    if not place.line or path.startswith("~") or (is_id(path) and not is_there):
        return text
    return os.path.normpath(folder / text)


def _listed(match: Any) -> tuple[Any, ...]:
    return tuple(match) if isinstance(match, list) else (match,)


def _whole(value: Any) -> Any:
    """Whole numbers as int: JSON Schema takes 4.0 for 4, and so does the preset."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return [_whole(item) for item in value] if isinstance(value, list) else value
