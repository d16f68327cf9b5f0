"""Which rule decides which layer.

Layers may be counted from the end, as in Python: `model.layers.-1.*` or `*.layers.{-2..-1}.*`
match the last layers of a model whatever their number.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Collection, Mapping

from mixedprec_plugin.plan.candidates import Candidates
from mixedprec_plugin.preset.model import Rule

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_FROM_END = re.compile(r"-\d")


@dataclasses.dataclass(frozen=True)
class Matches:
    """What the rules of a preset match among the layers of a checkpoint.

    Attributes:
        deciding: layer name -> the last rule that matches it.
        matched: rule index -> every layer name that the rule matches, decided by it or not.
    """

    deciding: Mapping[str, Rule]
    matched: Mapping[int, frozenset[str]]


def match_rules(
    rules: Collection[Rule], names: Collection[str], uncounted: Collection[str] = ()
) -> Matches:
    """Match every rule against every layer name; the last rule that matches a layer wins.

    Args:
        uncounted: names that stand behind the last layer, where layers are counted from the end.
    """
    candidates = Candidates(names)
    from_end = _FromEnd(names, uncounted)
    deciding: dict[str, Rule] = {}
    matched: dict[int, frozenset[str]] = {}
    for rule in rules:
        hits: set[str] = set()
        for pattern in rule.patterns:
            hits.update(candidates.match(pattern))
            if _FROM_END.search(pattern):
                hits.update(from_end.match(pattern))
        matched[rule.index] = frozenset(hits)
        deciding.update(dict.fromkeys(hits, rule))
    return Matches(deciding, matched)


class _FromEnd:
    """Finds names by globs that count layers from the end; made ready when it is first asked."""

    def __init__(self, names: Collection[str], uncounted: Collection[str]) -> None:
        self._names = names
        self._uncounted = uncounted

    def match(self, pattern: str) -> list[str]:
        return [self._by_alias[alias] for alias in self._candidates.match(pattern)]

    @functools.cached_property
    def _by_alias(self) -> dict[str, str]:
        counted = [name for name in self._names if name not in self._uncounted]
        return {alias: name for name, alias in names_from_end(counted).items()}

    @functools.cached_property
    def _candidates(self) -> Candidates:
        return Candidates(self._by_alias)


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
