"""Which rule decides which layer.

Layers may be counted from the end, as in Python: `model.layers.-1.*` or `*.layers.{-2..-1}.*`
match the last layers of a model whatever their number.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping

from mixedprec_plugin.names import compile_pattern
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
    from_end = names_from_end([name for name in names if name not in uncounted])
    deciding: dict[str, Rule] = {}
    matched: dict[int, frozenset[str]] = {}
    for rule in rules:
        hits: set[str] = set()
        for pattern in rule.patterns:
            matches = compile_pattern(pattern)
            hits.update(name for name in names if matches(name))
            if _FROM_END.search(pattern):
                hits.update(name for name, alias in from_end.items() if matches(alias))
        matched[rule.index] = frozenset(hits)
        deciding.update(dict.fromkeys(hits, rule))
    return Matches(deciding, matched)


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
