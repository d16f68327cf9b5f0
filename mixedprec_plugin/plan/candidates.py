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
_FEW = 3


class Candidates:
    """Finds the names that globs match.

    Args:
        names: what is matched.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        # places that names have -> place -> those of them that have it, too
        self._indices: dict[tuple[str, ...], dict[str, list[str]]] = {}
        self._num_asked = 0

    def match(self, pattern: str) -> list[str]:
        """Every name that a glob matches."""
        matches = compile_pattern(pattern)
        return [name for name in self._narrowed(pattern) if matches(name)]

    def _narrowed(self, pattern: str) -> Collection[str]:
        needed = sorted(_places(pattern), key=len)
        self._num_asked += bool(needed)
        if self._num_asked <= _FEW:
            return self._names
        best: Collection[str] = self._names
        known: tuple[str, ...] = ()
        for places in needed:
            index = self._index(known, best)
            if len(places) > 1:
                return [name for place in places for name in index.get(place, ())]
            best = index.get(places[0], ())
            known = (*known, places[0])
        return best

    def _index(self, known: tuple[str, ...], names: Collection[str]) -> dict[str, list[str]]:
        if known not in self._indices:
            index = self._indices[known] = {}
            for name in names:
                for place in _NUMBERED.findall(name):
                    index.setdefault(place, []).append(name)
        return self._indices[known]


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
