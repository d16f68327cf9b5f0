"""Which rule decides which layer.

Layers may be counted from the end, as in Python: `model.layers.-1.*` or `*.layers.{-2..-1}.*`
match the last layers of a model whatever their number.

70,000 layers times hundreds of rules for single experts would be 40 million matches. Nearly all
fail at `layers.7` or `experts.{3,17}`, so that names are found by such places first.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Collection, Iterator, Mapping

from mixedprec_plugin.names import compile_pattern
from mixedprec_plugin.preset.model import Rule

_FROM_END = re.compile(r"-\d")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_PLACE = re.compile(r"(?<![^.])[^.]+\.-?\d+(?![^.])")
_LIST = r"\{-?\d+(?:,-?\d+)+\}"
_NESTED = re.compile(r"\{[^}]*\{")
_OPEN = re.compile(rf"\[[^\]]*\]|(?!{_LIST})\{{[^}}]*\}}")
_NEEDED = re.compile(rf"(?<![^.])([^\W\d]\w*)\.(-?\d+|{_LIST})(?![^.])")


@dataclasses.dataclass(frozen=True)
class Matches:
    """What the rules of a preset match among the layers of a checkpoint.

    Attributes:
        deciding: layer name -> the last rule that matches it.
        matched: rule index -> every layer name that the rule matches, decided by it or not.
        idle: rule index -> which of its patterns match no layer.
    """

    deciding: Mapping[str, Rule]
    matched: Mapping[int, frozenset[str]]
    idle: Mapping[int, list[int]]


def match_rules(
    rules: Collection[Rule], names: Collection[str], uncounted: Collection[str] = ()
) -> Matches:
    """Match every rule against every layer name; the last rule that matches a layer wins.

    Args:
        uncounted: names that stand behind the last layer, where layers are counted from the end.
    """

    @functools.cache
    def from_end() -> tuple[dict[str, str], Candidates]:
        counted = names_from_end([name for name in names if name not in uncounted])
        by_alias = {alias: name for name, alias in counted.items()}
        return by_alias, Candidates(by_alias)

    candidates = Candidates(names)
    deciding: dict[str, Rule] = {}
    matched: dict[int, frozenset[str]] = {}
    idle: dict[int, list[int]] = {}
    for rule in rules:
        hits: list[set[str]] = []
        for pattern in rule.patterns:
            hits.append(set(candidates.match(pattern)))
            if _FROM_END.search(pattern):
                by_alias, aliases = from_end()
                hits[-1].update(by_alias[alias] for alias in aliases.match(pattern))
        idle[rule.index] = [index for index, names in enumerate(hits) if not names]
        matched[rule.index] = frozenset().union(*hits)
        deciding.update(dict.fromkeys(matched[rule.index], rule))
    return Matches(deciding, matched, idle)


def names_from_end(names: Collection[str]) -> dict[str, str]:
    """Layer name -> the same name with its first number counted from the end.

    `model.layers.29.mlp.up_proj` of 30 layers -> `model.layers.-1.mlp.up_proj`; names without a
    number are left out. Names that differ before the number are counted apart.
    """
    found = {name: match for name in names if (match := _NUMBER.search(name))}
    counts: dict[str, int] = {}
    for name, match in found.items():
        prefix = name[: match.start()]
        counts[prefix] = max(counts.get(prefix, 0), int(match.group()) + 1)
    return {
        name: f"{(prefix := name[: match.start()])}{int(match.group()) - counts[prefix]}"
        f"{name[match.end() :]}"
        for name, match in found.items()
    }


class Candidates:
    """Finds which of some names globs match."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names

    def match(self, pattern: str) -> list[str]:
        """Every name that a glob matches."""
        matches = compile_pattern(pattern)
        return [name for name in self._narrowed(pattern) if matches(name)]

    def _narrowed(self, pattern: str) -> Collection[str]:
        found = [
            set().union(*(self._by_place.get(place, ()) for place in places))
            for places in _needed(pattern)
        ]
        return set.intersection(*found) if found else self._names

    @functools.cached_property
    def _by_place(self) -> dict[str, set[str]]:
        index: dict[str, set[str]] = {}
        for name in self._names:
            for place in _PLACE.findall(name):
                index.setdefault(place, set()).add(name)
        return index


def _needed(pattern: str) -> Iterator[list[str]]:
    """Yield the places, `layers.7` or `experts.3` and `experts.17`, one of which a name must have.

    Only of components that stand outside braces and sets, between literal dots.
    """
    if not _NESTED.search(pattern):
        for word, numbers in _NEEDED.findall(_OPEN.sub("*", pattern)):
            yield [f"{word}.{number}" for number in numbers.strip("{}").split(",")]
