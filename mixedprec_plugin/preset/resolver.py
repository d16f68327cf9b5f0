"""Resolves a preset's interpolations, and the lists in its patterns.

OmegaConf resolves them, one text after another, each after those that it refers to: a circle, or
text that doubles itself thirty times, is found before it is followed. It is given these two forms
alone, as it would run any resolver that some package has registered, and recurses as deeply as a
text nests.

Within a pattern a list stands for the alternatives of a glob: with `lists: {hot: [3, "40..47"]}`,
`*.experts.${lists.hot}.*` is `*.experts.{3,{40..47}}.*`. One that stands alone stays a list.
"""

from __future__ import annotations

import contextlib
import os
import re
from typing import Any, NoReturn

from omegaconf import Container, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mixedprec_plugin.preset.document import Document, Path, Scalar, at, rewrite
from mixedprec_plugin.preset.interpolation import (
    EXPRESSION,
    Reference,
    Variable,
    check_text,
    escape,
    is_interpolated,
    part_of,
)

MAX_SIZE = 1 << 21
MAX_CHAIN = 32

# what a reference counts for, however short its value
_REFERENCE_SIZE = 64
# a key that no preset has: what stands there is put in place of lists within text
_WRITTEN_LISTS = "lists-within-text"
_MISSING = "missing-key"
_RANGE = re.compile(r"-?\d+\.\.-?\d+(\.\.-?\d+)?")


def resolve(document: Document) -> tuple[Any, Any]:
    """Resolve every interpolation of a merged preset.

    Returns:
        Plain data, in which null stands for every value that could not be resolved; and the same
        for messages and files, with `${oc.env:NAME}` in place of that variable's value. Both are
        None where it would be too long.
    """
    try:
        return _Resolver(document).resolve()
    except _TooLongError:
        what = f"interpolations make the preset longer than {MAX_SIZE} characters"
        document.report((), what, "refer to less", "interpolation-bomb")
        return None, None


class _BrokenError(Exception):
    """A value depends on one that has a problem."""


class _TooLongError(Exception):
    """The preset would be longer than MAX_SIZE."""


class _Resolver:
    """Depth-first search over what refers to what.

    Attributes:
        pending: the paths of all texts with interpolations.
        below: the path of a mapping or a list -> those of them that lie in it.
        lists: name -> what is written for a list within text.
        configs: the preset with the values of environment variables, and with their names.
        depths: path of what is resolved -> how many references lie one behind another in it.
    """

    def __init__(self, document: Document) -> None:
        self.document = document
        self.pending = {path: 0 for path, value in document.parts() if is_interpolated(value)}
        self.below: dict[Path, list[Path]] = {}
        for path in self.pending:
            for length in range(len(path)):
                self.below.setdefault(path[:length], []).append(path)
        lists = document.data.get("lists")
        entries = lists.items() if isinstance(lists, dict) else ()
        self.lists = {name: _alternatives(items) for name, items in entries}
        data = rewrite(document.data, self._point) | {_WRITTEN_LISTS: self.lists}
        masked = rewrite(data, _mask)
        self.configs: list[Any] = [OmegaConf.create(data)]
        if masked != data:
            self.configs.append(OmegaConf.create(masked))
        self.size = 0
        self.depths: dict[Path, int] = {}
        self.open: list[Path] = []

    def resolve(self) -> tuple[Any, Any]:
        for path in self.pending:
            with contextlib.suppress(_BrokenError):
                self._resolve(path)
        for config in self.configs:
            del config[_WRITTEN_LISTS]
        data = [OmegaConf.to_container(config, resolve=True) for config in self.configs]
        return data[0], data[-1]

    def _resolve(self, path: Path) -> int:
        """Put its value in the place of one text, and return the depth."""
        if path in self.depths:
            return self.depths[path]
        if path in self.open:
            links = [*self.open[self.open.index(path) :], path]
            chain = " -> ".join(self.document.locate(link).key for link in links)
            what = f"interpolations go in a circle: {chain}"
            self._fail(path, what, "write one of them out", "interpolation-cycle")
        self.open.append(path)
        try:
            if path in self.document.broken:
                raise _BrokenError
            parts, is_whole = check_text(at(self.document.data, path))
            depth = len(self.open) - 1
            if depth <= MAX_CHAIN:
                depth = max((self._follow(path, part, is_whole) for part in parts), default=0)
            if depth > MAX_CHAIN:
                what = f"more than {MAX_CHAIN} interpolations lie one behind another"
                self._fail(path, what, "refer to the value itself", "interpolation-chain")
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
                parent = at(config, path[:-1])
                parent[path[-1]] = None if is_broken else escape(parent[path[-1]])
        except OmegaConfBaseException as error:
            what = f"cannot be resolved: {str(error).splitlines()[0]}"
            self._fail(path, what, "", "interpolation")

    def _follow(self, path: Path, part: Reference | Variable, is_whole: bool) -> int:
        """Check what one interpolation refers to, and resolve that."""
        if isinstance(part, Reference):
            written = "" if is_whole else self._list(part)
            self._count(len(written))
            return 1 if written else self._refer(path, part, is_whole) + 1
        value = os.environ.get(part.name)
        if value is None and not part.has_default:
            what = f"the environment variable {part.name} is not set"
            remedy = f"set it, or give a default: ${{oc.env:{part.name},DEFAULT}}"
            self._fail(path, what, remedy, "missing-variable")
        self._count(len(value or ""))
        return self._follow(path, part.nested, is_whole=False) if part.nested else 0

    def _refer(self, path: Path, reference: Reference, is_whole: bool) -> int:
        if reference.dots > len(path):
            self._fail(path, f"{reference.text} points at nothing (no such level)", "", _MISSING)
        target = path[: len(path) - reference.dots] if reference.dots else ()
        node = at(self.configs[0], target)
        depth = 0
        for number, key in enumerate(reference.keys, start=1):
            names: Any = node.keys() if isinstance(node, DictConfig) else ()
            is_index = isinstance(node, ListConfig) and key.isdecimal()
            if not (int(key[:9]) < len(node) if is_index else key in names):
                missing = f"there is no {'.'.join(reference.keys[:number])!r}"
                what = f"{reference.text} points at nothing ({missing})"
                self._fail(path, what, self.document.findings.suggest(key, names), _MISSING)
            target = (*target, int(key) if is_index else key)
            depth = max(depth, self._resolve(target) if target in self.pending else 0)
            node = node[target[-1]]
        if isinstance(node, Container):
            depth = max([depth, *map(self._resolve, self.below.get(target, ()))])
            if not is_whole:
                what = f"{reference.text} is not text and stands within text"
                self._fail(path, what, "let it stand alone", "interpolation-type")
        self._count(_REFERENCE_SIZE + len(str(node)))
        return depth

    def _count(self, size: int) -> None:
        self.size += size
        if self.size > MAX_SIZE:
            raise _TooLongError

    def _fail(self, path: Path, what: str, remedy: str, rule: str) -> NoReturn:
        self.document.report(path, what, remedy, rule)
        raise _BrokenError

    def _point(self, path: Path, value: Scalar) -> Scalar:
        """Let the lists within one text point at what is written for them."""
        if not is_interpolated(value) or path in self.document.broken or check_text(value)[1]:
            return value

        def write(match: re.Match[str]) -> str:
            part = part_of(match[2], match[3])
            if isinstance(part, Variable) or not self._list(part):
                return match[0]
            return f"{match[1]}${{{_WRITTEN_LISTS}.{part.keys[1]}}}"

        return EXPRESSION.sub(write, value)

    def _list(self, reference: Reference) -> str:
        """What is written for a list within text; empty where nothing is."""
        is_list = len(reference.keys) == 2 and reference.keys[0] == "lists" and not reference.dots
        return self.lists.get(reference.keys[1], "") if is_list else ""


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
        part: Reference | Variable | None = part_of(match[2], match[3])
        while isinstance(part, Variable) and part.name not in os.environ:
            part = part.nested
        return f"{match[1]}\\{part.text}" if isinstance(part, Variable) else match[0]

    return EXPRESSION.sub(name, value) if is_interpolated(value) else value
