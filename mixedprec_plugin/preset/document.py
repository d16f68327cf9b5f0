"""The plain data of a preset beside the places of its parts, and what is wrong with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Container, Iterator, Sequence
from typing import Any

from mixedprec_plugin.errors import Problem, Severity
from mixedprec_plugin.names import Nearest
from mixedprec_plugin.preset.model import Location

Scalar = str | int | float | bool | None
Path = tuple[str | int, ...]


class RefusedError(Exception):
    """Why a value is refused, (what, remedy, rule): said where its place is not known."""


class Findings:
    """What is wrong with a preset, once each."""

    def __init__(self) -> None:
        self._found: dict[tuple[Location, str], Problem] = {}
        self._nearest = Nearest()

    def add(
        self,
        place: Location,
        what: str,
        remedy: str = "",
        rule: str = "",
        severity: Severity = "error",
    ) -> None:
        """Keep one problem, unless it is there already."""
        self._found.setdefault((place, what), Problem(str(place), what, remedy, rule, severity))

    def forget(self, file: str) -> None:
        """Drop what was found in a file."""
        self._found = {key: x for key, x in self._found.items() if key[0].file != file}

    def has_errors(self) -> bool:
        """Whether anything was found that stops the work."""
        return any(problem.severity == "error" for problem in self._found.values())

    def sorted(self, files: Sequence[str], severity: Severity) -> tuple[Problem, ...]:
        """The problems of one severity by file, in the order given, and line; others come last."""
        order = {file: index for index, file in enumerate(files)}
        found = [(place, p) for (place, _), p in self._found.items() if p.severity == severity]
        found.sort(key=lambda pair: (order.get(pair[0].file, len(order)), pair[0].line))
        return tuple(problem for _, problem in found)

    def suggest(self, name: str, names: Collection[str]) -> str:
        """The remedy that names what was meant; empty where nothing is near."""
        begun = [other for other in names if other.startswith(f"{name}_")]
        near = begun[:3] or self._nearest.find(name, names)
        return f"did you mean {' or '.join(map(repr, near))}?" if near else ""


@dataclasses.dataclass
class Document:
    """One file of a preset, or several of them merged.

    Attributes:
        file: what errors call it.
        data: mappings, lists and scalars; None where the file cannot be read.
        places: key path -> where that part was written. The root is always there.
        broken: key paths of parts that have a problem: what later checks find there follows of it.
    """

    file: str
    findings: Findings
    data: Any = None
    places: dict[Path, Location] = dataclasses.field(default_factory=dict)
    broken: set[Path] = dataclasses.field(default_factory=set)

    def __post_init__(self) -> None:
        self.places.setdefault((), Location(self.file, 0))
        self._around = {link for path in self.broken for link in _prefixes(path)}

    def locate(self, path: Path) -> Location:
        """Where `path` was written; where it was not, the nearest thing around it that was."""
        depth = next(n for n in range(len(path), -1, -1) if path[:n] in self.places)
        place = self.places[path[:depth]]
        return dataclasses.replace(place, key=join_path(path[depth:], place.key))

    def report(self, path: Path, what: str, remedy: str = "", rule: str = "") -> None:
        """Say what is wrong at a path."""
        self.findings.add(self.locate(path), what, remedy, rule)
        self.mark(path)

    def mark(self, path: Path) -> None:
        """Take a part for broken without a word."""
        self.broken.add(path)
        self._around.update(_prefixes(path))

    def is_sound(self, path: Path) -> bool:
        """Whether nothing at, below or around a part was found wrong."""
        return path not in self._around and not is_within(path, self.broken)

    def parts(self) -> Iterator[tuple[Path, Any]]:
        """Every mapping, list and scalar with its path, however deeply they nest."""
        stack: list[tuple[Path, Any]] = [((), self.data)]
        while stack:
            path, value = stack.pop()
            yield path, value
            if isinstance(value, dict | list):
                items = value.items() if isinstance(value, dict) else enumerate(value)
                stack.extend(reversed([((*path, key), item) for key, item in items]))


def is_within(path: Path, others: Container[Path]) -> bool:
    """Whether a path is one of others, or below one; the root does not count."""
    return any(prefix in others for prefix in _prefixes(path))


def _prefixes(path: Path) -> list[Path]:
    return [path[:length] for length in range(1, len(path) + 1)]


def rewrite(data: Any, change: Callable[[Path, Scalar], Scalar], path: Path = ()) -> Any:
    """Copy plain data, every scalar changed."""
    if isinstance(data, dict):
        return {key: rewrite(value, change, (*path, key)) for key, value in data.items()}
    if isinstance(data, list):
        return [rewrite(value, change, (*path, index)) for index, value in enumerate(data)]
    return change(path, data)


def at(data: Any, path: Path) -> Any:
    """The value at a path, or None where there is none."""
    for key in path:
        try:
            data = data[key]
        except (KeyError, IndexError, TypeError):
            return None
    return data


def join_path(path: Path, start: str = "") -> str:
    """Write a path as people do: `rules[2].group_size`."""
    for key in path:
        start += f"[{key}]" if isinstance(key, int) else f".{key}" if start else key
    return start
