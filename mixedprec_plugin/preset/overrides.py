"""Overrides from the command line, `schemes.experts.group_size=64`, as OmegaConf's dotlists."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mixedprec_plugin.preset.findings import Findings
from mixedprec_plugin.preset.model import Location
from mixedprec_plugin.preset.reader import read_value
from mixedprec_plugin.preset.tree import Node, Path, join_path

FLAG = "--mixedprec-set"

_KEY = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+|\[[A-Za-z0-9_-]+\])*")
_PART = re.compile(r"[A-Za-z0-9_-]+")


class _MisplacedError(Exception):
    """The key of an override leads nowhere."""

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(what)
        self.remedy = remedy


def apply_overrides(root: Node, overrides: Sequence[str], findings: Findings) -> Node:
    """Return the tree with every `KEY=VALUE` set, in order.

    A mapping is merged into the mapping that is there, a list replaces the list, an item of a list
    is reached by its number (`rules.0.method`, `rules[0].method`) and must exist.
    """
    for override in overrides:
        root = _apply(root, override, findings)
    return root


def _apply(root: Node, override: str, findings: Findings) -> Node:
    location = Location(f"{FLAG} {override}", 0)
    key, equals, text = override.partition("=")
    if not equals or not _KEY.fullmatch(key):
        what = "is not an override (expected KEY=VALUE, such as schemes.experts.group_size=64)"
        findings.add(location, what, rule="override")
        return root
    path = tuple(_PART.findall(key))
    if path[0] == "extends":
        what = "the key 'extends' cannot be overridden"
        findings.add(location, what, "parents are read first; change the file", "override")
        return root
    if text.startswith("*"):
        node: Node | None = Node(text, location)
    else:
        node = read_value(text, location.file, findings)
    if node is None:
        return root
    try:
        return _set(root, path, (), node, location)
    except _MisplacedError as error:
        findings.add(location, str(error), error.remedy, "override")
        return root


def _set(node: Node, path: tuple[str, ...], above: Path, new: Node, location: Location) -> Node:
    if not path:
        return _merge(node, new)
    key, rest = path[0], path[1:]
    if isinstance(node.value, dict):
        below = node.value.get(key) or Node({} if rest else None, location)
        changed = _set(below, rest, (*above, key), new, location)
        return Node({**node.value, key: changed}, node.location)
    if isinstance(node.value, list):
        if not key.isdecimal() or int(key) >= len(node.value):
            raise _MisplacedError(
                f"{join_path(above)} has no item {key!r} (expected a number below "
                f"{len(node.value)})"
            )
        items = list(node.value)
        items[int(key)] = _set(items[int(key)], rest, (*above, int(key)), new, location)
        return Node(items, node.location)
    if isinstance(node.value, str) and "${" in node.value:
        raise _MisplacedError(
            f"{join_path(above)} is the interpolation {node.value!r} and has no {key!r} of its own",
            "override what it points at, or set it as a whole",
        )
    raise _MisplacedError(f"{join_path(above)} is {node.value!r} and has no {key!r}")


def _merge(old: Node, new: Node) -> Node:
    if not isinstance(old.value, dict) or not isinstance(new.value, dict):
        return new
    merged = dict(old.value)
    for key, node in new.value.items():
        merged[key] = _merge(merged[key], node) if key in merged else node
    return Node(merged, old.location)
