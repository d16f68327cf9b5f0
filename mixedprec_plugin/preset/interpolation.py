"""Resolves interpolations, `${schemes.attention}` and `${oc.env:NAME}`, and lists in patterns.

OmegaConf resolves one text after another, each after those that it refers to. So a circle, or text
that doubles itself thirty times, is found before it is followed, and every mistake has its line.

Within a pattern a list stands for the alternatives of a glob, `${lists.hot}` for `{3,17,42}`:

    lists:
      hot: [3, 17, "40..47"]
    rules:
      - {match: "*.mlp.experts.${lists.hot}.*", scheme: fine}

A list that stands alone, `match: ${lists.hot}`, stays a list: that of the rule's patterns.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection
from typing import Any, NoReturn

from omegaconf import Container, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mixedprec_plugin.preset.document import Document, Path, Scalar, at, rewrite
from mixedprec_plugin.preset.expressions import (
    EXPRESSION,
    Reference,
    Variable,
    is_interpolated,
    parse_text,
)

MAX_SIZE = 1 << 21
MAX_CHAIN = 32

# what a reference counts for, however short its value
_REFERENCE_SIZE = 64
_RANGE = re.compile(r"-?\d+\.\.-?\d+(\.\.-?\d+)?")


def resolve(document: Document, untrusted: str = "") -> tuple[Any, Any]:
    """Resolve every interpolation of a merged preset.

    Args:
        untrusted: the file whose texts may not read environment variables.
    Returns:
        Plain data, in which null stands for every value that could not be resolved; and the same
        for messages and files, with `${oc.env:NAME}` in place of that variable's value.
    """
    pending = {path: None for path, value in document.scalars() if is_interpolated(value)}
    if not pending:
        return document.data, document.data
    try:
        return _Resolver(document, pending, untrusted).resolve()
    except _TooLargeError:
        what = f"interpolations make the preset longer than {MAX_SIZE} characters"
        document.report((), what, "refer to less", "interpolation-bomb")
        return None, None


def escape(data: Any) -> Any:
    """Write text so that resolving it gives it back: `${` in it is no interpolation."""

    def change(_: Path, value: Scalar) -> Scalar:
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value

    return rewrite(data, change)


class _BrokenError(Exception):
    """A value depends on one that has a problem."""


class _TooLargeError(Exception):
    pass


class _Resolver:
    """Depth-first search over what refers to what.

    Attributes:
        pending: the paths of all texts with interpolations.
        filled: the preset with lists written out in patterns.
        configs: that with the values of environment variables, and with their names.
        depths: path of what is resolved -> how many references lie one behind another in it.
    """

    def __init__(self, document: Document, pending: Collection[Path], untrusted: str) -> None:
        self.document = document
        self.pending = pending
        self.untrusted = untrusted
        self.depths: dict[Path, int] = {}
        self.open: list[Path] = []
        self.size = 0
        lists = at(document.data, ("lists",))
        lists = lists.items() if isinstance(lists, dict) else ()
        self.lists = {name: _alternatives(items) for name, items in lists}
        self.filled = rewrite(document.data, self._fill)
        masked = rewrite(self.filled, _mask)
        variants = [self.filled] if masked == self.filled else [self.filled, masked]
        self.configs: list[Any] = [OmegaConf.create(data) for data in variants]

    def resolve(self) -> tuple[Any, Any]:
        for path in self.pending:
            with contextlib.suppress(_BrokenError):
                self._resolve(path)
        data = [OmegaConf.to_container(config, resolve=True) for config in self.configs]
        return data[0], data[-1]

    def _resolve(self, path: Path) -> int:
        """Put its value in the place of one text, and return the depth."""
        if path in self.depths:
            return self.depths[path]
        if path in self.open:
            self._circle(path)
        self.open.append(path)
        try:
            if path in self.document.broken:
                raise _BrokenError
            if len(self.open) > MAX_CHAIN + 1:
                self._too_long(path)
            parts, is_whole = parse_text(at(self.document.data, path))
            depth = max((self._depth(path, part, is_whole) for part in parts), default=0)
            if depth > MAX_CHAIN:
                self._too_long(path)
            self._assign(path)
        except _BrokenError:
            self.document.mark(path)
            self._assign(path, is_broken=True)
            raise
        finally:
            self.open.pop()
        self.depths[path] = depth
        return depth

    def _assign(self, path: Path, is_broken: bool = False) -> None:
        try:
            for config in self.configs:
                parent = _walk(config, path[:-1])
                parent[path[-1]] = None if is_broken else escape(parent[path[-1]])
        except OmegaConfBaseException as error:
            self._fail(path, f"cannot be resolved: {str(error).splitlines()[0]}")

    def _depth(self, path: Path, part: Reference | Variable, is_whole: bool) -> int:
        """Check what one interpolation refers to, and resolve that."""
        if isinstance(part, Reference):
            is_written = not is_whole and self._list(part)
            return 1 if is_written else self._refer(path, part, is_whole) + 1
        if self.document.locate(path).file == self.untrusted:
            what = f"{part.text} reads the environment, which a checkpoint's own preset may not"
            self._fail(path, what, "name a preset of your own", "environment")
        value = os.environ.get(part.name)
        if value is None and not part.has_default:
            what = f"the environment variable {part.name} is not set"
            remedy = f"set it, or give a default: ${{oc.env:{part.name},DEFAULT}}"
            self._fail(path, what, remedy, "missing-variable")
        self._count(len(value or ""))
        return self._depth(path, part.nested, is_whole=False) if part.nested else 0

    def _refer(self, path: Path, reference: Reference, is_whole: bool) -> int:
        if reference.dots > len(path):
            self._missing(path, reference, 0, [])
        target = path[: len(path) - reference.dots] if reference.dots else ()
        node = _walk(self.configs[0], target)
        depth = 0
        for number, key in enumerate(reference.keys):
            names = list(node) if isinstance(node, DictConfig) else []
            is_index = isinstance(node, ListConfig) and key.isdecimal()
            if not (int(key[:9]) < len(node) if is_index else key in names):
                self._missing(path, reference, number + 1, names)
            target = (*target, int(key) if is_index else key)
            depth = max(depth, self._resolve(target) if target in self.pending else 0)
            node = node[target[-1]]
        if isinstance(node, Container):
            below = [link for link in self.pending if link[: len(target)] == target]
            depth = max([depth, *(self._resolve(link) for link in below if link != target)])
            if not is_whole:
                what = f"{reference.text} is not text and stands within text"
                self._fail(path, what, "let it stand alone", "interpolation-type")
        self._count(_REFERENCE_SIZE + len(str(node)))
        return depth

    def _count(self, size: int) -> None:
        self.size += size
        if self.size > MAX_SIZE:
            raise _TooLargeError

    def _missing(self, path: Path, reference: Reference, depth: int, names: list[str]) -> NoReturn:
        keys = reference.keys[:depth]
        what = f"there is no {'.'.join(keys)!r}" if keys else "no such level"
        remedy = self.document.findings.suggest(keys[-1], names) if names else ""
        self._fail(path, f"{reference.text} points at nothing ({what})", remedy, "missing-key")

    def _circle(self, path: Path) -> NoReturn:
        links = self.open[self.open.index(path) :]
        chain = " -> ".join(self.document.locate(link).key for link in [*links, path])
        what = f"interpolations go in a circle: {chain}"
        self._fail(path, what, "write one of them out", "interpolation-cycle")

    def _too_long(self, path: Path) -> NoReturn:
        what = f"more than {MAX_CHAIN} interpolations lie one behind another"
        self._fail(path, what, "refer to the value itself", "interpolation-chain")

    def _fail(
        self, path: Path, what: str, remedy: str = "", rule: str = "interpolation"
    ) -> NoReturn:
        self.document.report(path, what, remedy, rule)
        raise _BrokenError

    def _fill(self, path: Path, value: Scalar) -> Scalar:
        """Write the lists within one text out."""
        if path not in self.pending or path in self.document.broken or parse_text(str(value))[1]:
            return value

        def write(match: re.Match[str]) -> str:
            (part,), _ = parse_text(match[2])
            written = self._list(part)
            self._count(len(written))
            return match[1] + (written or match[2])

        return EXPRESSION.sub(write, str(value))

    def _list(self, part: Reference | Variable) -> str:
        """What is written for a list within text; empty where nothing is."""
        match part:
            case Reference(keys=("lists", name), dots=0):
                return self.lists.get(name, "")
        return ""


def _walk(config: Any, path: Path) -> Any:
    for key in path:
        config = config[key]
    return config


def _alternatives(items: Any) -> str:
    """`[3, 17, "40..47"]` -> `{3,17,{40..47}}`; empty where that is no list to be written."""
    words = []
    for item in items if isinstance(items, list) else []:
        if isinstance(item, bool) or not isinstance(item, int | str) or is_interpolated(item):
            return ""
        words.append(f"{{{item}}}" if _RANGE.fullmatch(str(item)) else str(item))
    return words[0] if len(words) == 1 else f"{{{','.join(words)}}}" if words else ""


def _mask(_path: Path, value: Scalar) -> Scalar:
    """Write the names of environment variables in place of their values."""

    def name(match: re.Match[str]) -> str:
        (part,), _ = parse_text(match[2])
        while isinstance(part, Variable) and part.name not in os.environ and part.nested:
            part = part.nested
        is_read = isinstance(part, Variable) and part.name in os.environ
        return f"{match[1]}\\{part.text}" if is_read else match[0]

    return EXPRESSION.sub(name, str(value)) if is_interpolated(value) else value
