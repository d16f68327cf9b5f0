"""Collects what is wrong with a preset, once each, in the order of the files."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mixedprec_plugin.errors import Problem, Severity
from mixedprec_plugin.preset.model import Location

_Place = tuple[str, str]

_SEPARATOR = re.compile(r"[.\[]")


class Findings:
    """Problems with their locations.

    A value that already has a problem is muted: what later checks find in it is a consequence.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[Location, str], tuple[Location, Problem]] = {}
        self._muted: set[_Place] = set()
        self._touched: set[_Place] = set()
        self._around: set[_Place] = set()

    def add(
        self,
        location: Location,
        what: str,
        remedy: str = "",
        rule: str = "",
        severity: Severity = "error",
    ) -> None:
        """Keep one problem, unless it is there already."""
        problem = Problem(str(location), what, remedy, rule, severity)
        self._found.setdefault((location, what), (location, problem))
        self._touch(location)

    def mute(self, location: Location) -> None:
        """Say no more about the value at `location`."""
        self._muted.add((location.file, location.key))
        self._touch(location)

    def mute_found(self) -> None:
        """Say no more about any value that has a problem by now."""
        self._muted.update((place.file, place.key) for place, _ in self._found.values())

    def is_muted(self, location: Location) -> bool:
        """Whether `location` is, or is within, a value that was muted."""
        return any(place in self._muted for place in _outwards(location))

    def touches(self, location: Location) -> bool:
        """Whether anything at, within or around `location` was found or muted."""
        if (location.file, location.key) in self._around:
            return True
        return any(place in self._touched for place in _outwards(location))

    def has_errors(self) -> bool:
        """Whether anything was found that stops the work."""
        return any(problem.severity == "error" for _, problem in self._found.values())

    def sorted(self, files: Sequence[str], severity: Severity) -> tuple[Problem, ...]:
        """The problems of one severity by file, in the order given, and line; others come last."""
        order = {file: index for index, file in enumerate(files)}
        found = [pair for pair in self._found.values() if pair[1].severity == severity]
        found.sort(key=lambda pair: (order.get(pair[0].file, len(order)), pair[0].line))
        return tuple(problem for _, problem in found)

    def _touch(self, location: Location) -> None:
        self._touched.add((location.file, location.key))
        self._around.update(_outwards(location))


def _outwards(location: Location) -> list[_Place]:
    """A place and every one around it, short of the whole file."""
    key = location.key
    ends = [match.start() for match in _SEPARATOR.finditer(key)]
    return [(location.file, key)] + [(location.file, key[:end]) for end in reversed(ends) if end]
