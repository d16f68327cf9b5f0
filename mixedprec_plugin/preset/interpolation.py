"""Interpolations: `${schemes.attention}` and `${oc.env:NAME}`, and nothing else.

OmegaConf parses and resolves them. Before it does, every reference is followed here: only then are
a resolver that may do anything, an endless circle, or text that doubles itself thirty times out of
the question, and only so does every mistake get its line.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any, NoReturn

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mixedprec_plugin.names import nearest
from mixedprec_plugin.preset.findings import Findings
from mixedprec_plugin.preset.references import (
    Environment,
    Expression,
    ExpressionError,
    Reference,
    parse_expression,
)
from mixedprec_plugin.preset.tree import Key, Node, Path

MAX_SIZE = 1 << 21
MAX_CHAIN = 32
MAX_OPEN = 3 * MAX_CHAIN


def resolve(root: Node, findings: Findings) -> Any:
    """Resolve every interpolation of a merged preset.

    Returns:
        Plain data; null stands for every value that could not be resolved, and its location is
        muted.
    """
    if not any(_is_interpolated(node) for _, node in root.scalars()):
        return root.plain()
    checker = _Checker(root, findings)
    checker.check()
    data = root.plain()
    for path in checker.broken:
        findings.mute(root.locate(path))
        _assign(data, path, None)
    try:
        return OmegaConf.to_container(OmegaConf.create(data), resolve=True)
    except OmegaConfBaseException as error:
        findings.add(root.location, f"cannot be resolved: {error}", rule="interpolation")
        return data


def escape(data: Any) -> Any:
    """Write text so that resolving it gives it back: `${` in it is no interpolation."""
    if isinstance(data, dict):
        return {key: escape(value) for key, value in data.items()}
    if isinstance(data, list):
        return [escape(value) for value in data]
    if not isinstance(data, str) or "${" not in data:
        return data
    head, *parts = data.split("${")
    text = head
    for part in parts:
        stem = text.rstrip("\\")
        text = stem + "\\" * (2 * (len(text) - len(stem)) + 1) + "${" + part
    return text


class _BrokenError(Exception):
    """A value depends on one that has a problem."""


@dataclasses.dataclass(frozen=True)
class _Extent:
    """How long a value is when it is resolved, and how many references lie one behind another."""

    size: int
    depth: int

    def __add__(self, other: _Extent) -> _Extent:
        return _Extent(self.size + other.size, max(self.depth, other.depth))


_NODE = _Extent(16, 0)


class _Checker:
    """Depth-first search over what refers to what.

    Attributes:
        broken: the scalars that cannot be resolved.
    """

    def __init__(self, root: Node, findings: Findings) -> None:
        self.root = root
        self.findings = findings
        self.broken: set[Path] = set()
        self.extents: dict[Path, _Extent] = {}
        self.open: list[Path] = []

    def check(self) -> None:
        total = 0
        for path, _ in self.root.scalars():
            try:
                total += self._extent(path).size
            except _BrokenError:
                self.broken.add(path)
        if total > MAX_SIZE:
            what = f"interpolations make the preset longer than {MAX_SIZE} characters"
            self.findings.add(self.root.location, what, "refer to less", "interpolation-bomb")
            self.broken.update(path for path, _ in self.root.scalars())

    def _extent(self, path: Path) -> _Extent:
        if path in self.broken:
            raise _BrokenError
        if path not in self.extents:
            if path in self.open:
                self._circle(path)
            self.open.append(path)
            try:
                self.extents[path] = self._measure(path)
            finally:
                self.open.pop()
        return self.extents[path]

    def _measure(self, path: Path) -> _Extent:
        node = _at(self.root, path)
        if isinstance(node.value, dict):
            return sum((self._extent((*path, key)) for key in node.value), _NODE)
        if isinstance(node.value, list):
            return sum((self._extent((*path, i)) for i in range(len(node.value))), _NODE)
        own = _NODE + _Extent(len(str(node.value)), 0)
        if not isinstance(node.value, str) or "${" not in node.value:
            return own
        expression = self._parse(path, node.value)
        return sum((self._part(path, part, expression) for part in expression.parts), own)

    def _part(self, path: Path, part: Reference | Environment, whole: Expression) -> _Extent:
        if isinstance(part, Environment):
            value = os.environ.get(part.name)
            if value is None and not part.has_default:
                what = f"the environment variable {part.name} is not set"
                remedy = f"set it, or give a default: ${{oc.env:{part.name},DEFAULT}}"
                self._fail(path, what, remedy, "missing-variable")
            return _Extent(len(value or ""), 0)
        target = self._target(path, part)
        if len(self.open) > MAX_OPEN:
            self._too_long(path)
        extent = self._extent(target)
        if extent.depth >= MAX_CHAIN:
            self._too_long(path)
        if not whole.is_whole and isinstance(self._behind(target).value, (dict, list)):
            what = f"{part.text} is not text and stands within text"
            self._fail(path, what, "let it stand alone", "interpolation-type")
        return _Extent(extent.size, extent.depth + 1)

    def _too_long(self, path: Path) -> NoReturn:
        what = f"more than {MAX_CHAIN} interpolations lie one behind another"
        self._fail(path, what, "refer to the value itself", "interpolation-chain")

    def _parse(self, path: Path, text: str) -> Expression:
        try:
            return parse_expression(text)
        except ExpressionError as error:
            self._fail(path, str(error), error.remedy, error.rule)

    def _target(self, path: Path, reference: Reference) -> Path:
        """Where a reference points, through other references on its way."""
        if reference.dots > len(path):
            self._missing(path, reference, 0, [])
        base: Path = path[: len(path) - reference.dots] if reference.dots else ()
        for number, text in enumerate(reference.keys):
            if _is_interpolated(_at(self.root, base)):
                self._extent(base)
                base = self._path_behind(base)
            node = _at(self.root, base)
            key: Key = int(text) if isinstance(node.value, list) and text.isdecimal() else text
            if node.child(key) is None:
                near = list(node.value) if isinstance(node.value, dict) else []
                self._missing(path, reference, number + 1, near)
            base = (*base, key)
        return base

    def _behind(self, path: Path) -> Node:
        return _at(self.root, self._path_behind(path))

    def _path_behind(self, path: Path) -> Path:
        """Follow a value that is one reference and nothing else to what it stands for."""
        while _is_interpolated(node := _at(self.root, path)):
            expression = self._parse(path, str(node.value))
            if not expression.is_whole or not isinstance(expression.parts[0], Reference):
                break
            path = self._target(path, expression.parts[0])
        return path

    def _missing(self, path: Path, reference: Reference, depth: int, keys: list[str]) -> NoReturn:
        near = nearest(reference.keys[depth - 1], keys) if depth else []
        remedy = f"did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
        what = f"there is no {'.'.join(reference.keys[:depth])!r}" if depth else "no such level"
        self._fail(path, f"{reference.text} points at nothing ({what})", remedy, "missing-key")

    def _circle(self, path: Path) -> NoReturn:
        circle = self.open[self.open.index(path) :]
        links = [link for link in circle if _is_interpolated(_at(self.root, link))]
        chain = " -> ".join(self.root.locate(link).key for link in [*links, links[0]])
        what = f"interpolations go in a circle: {chain}"
        self._fail(links[0], what, "write one of them out", "interpolation-cycle")

    def _fail(self, path: Path, what: str, remedy: str, rule: str) -> NoReturn:
        self.findings.add(self.root.locate(path), what, remedy, rule)
        self.broken.add(path)
        raise _BrokenError


def _at(root: Node, path: Path) -> Node:
    node = root
    for key in path:
        below = node.child(key)
        assert below is not None
        node = below
    return node


def _is_interpolated(node: Node) -> bool:
    return isinstance(node.value, str) and "${" in node.value


def _assign(data: Any, path: Path, value: Any) -> None:
    for key in path[:-1]:
        data = data[key]
    data[path[-1]] = value
