"""Which rule decides which layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

from mixedprec_plugin.names import compile_pattern
from mixedprec_plugin.preset.model import Rule


@dataclasses.dataclass(frozen=True)
class Matches:
    """What the rules of a preset match among the layers of a checkpoint.

    Attributes:
        deciding: layer name -> the last rule that matches it.
        matched: rule index -> every layer name that the rule matches, decided by it or not.
    """

    deciding: Mapping[str, Rule]
    matched: Mapping[int, frozenset[str]]


def match_rules(rules: Collection[Rule], names: Collection[str]) -> Matches:
    """Match every rule against every layer name; the last rule that matches a layer wins."""
    deciding: dict[str, Rule] = {}
    matched: dict[int, frozenset[str]] = {}
    for rule in rules:
        patterns = [compile_pattern(pattern) for pattern in rule.patterns]
        hits = frozenset(name for name in names if any(matches(name) for matches in patterns))
        matched[rule.index] = hits
        deciding.update(dict.fromkeys(hits, rule))
    return Matches(deciding, matched)
