"""Which of many names a glob may match at all, told by the numbers that it spells out.

A model of 70,000 layers and a preset of hundreds of rules for single experts would be 40 million
matches; nearly all of them fail at `layers.7` or `experts.{3,17}`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator, Sequence

from mixedprec_plugin.names import compile_pattern

_NUMBERED = re.compile(r"(?<![^.])[^.]+\.-?\d+(?![^.])")
_WORD = re.compile(r"[^\W\d]\w*")
_NUMBER = re.compile(r"-?\d+")
_LIST = re.compile(r"\{-?\d+(?:,-?\d+)+\}")
# below this many matches, building the index takes longer
_FEW = 8


class Candidates:
    """Finds the names that globs match.

    Args:
        names: what is matched.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._by_place: dict[str, list[str]] = {}
        self._num_asked = 0

    def match(self, pattern: str) -> list[str]:
        """Every name that a glob matches."""
        matches = compile_pattern(pattern)
        return [name for name in self._narrowed(pattern) if matches(name)]

    def _narrowed(self, pattern: str) -> Collection[str]:
        self._num_asked += 1
        if self._num_asked <= _FEW:
            return self._names
        if not self._by_place:
            for name in self._names:
                for place in _NUMBERED.findall(name):
                    self._by_place.setdefault(place, []).append(name)
        best: Collection[str] = self._names
        for places in _places(pattern):
            found = [name for place in places for name in self._by_place.get(place, ())]
            if len(found) < len(best):
                best = found
        return best


def _places(pattern: str) -> Iterator[Sequence[str]]:
    """Yield the places, `layers.7` or `experts.3` and `experts.17`, one of which a name must have.

    Only of components that stand outside braces and sets, between literal dots.
    """
    components = _components(pattern)
    for word, number in itertools.pairwise(components):
        if not _WORD.fullmatch(word):
            continue
        if _NUMBER.fullmatch(number):
            yield [f"{word}.{number}"]
        elif _LIST.fullmatch(number):
            yield [f"{word}.{each}" for each in dict.fromkeys(number[1:-1].split(","))]


def _components(pattern: str) -> list[str]:
    """Split a glob at the dots that stand outside braces and sets."""
    components = [""]
    depth = 0
    for character in pattern:
        depth += (character in "{[") - (character in "}]")
        if character == "." and not depth:
            components.append("")
        else:
            components[-1] += character
    return components
