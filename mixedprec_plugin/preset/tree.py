"""YAML data that remembers where each part of it was written."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from mixedprec_plugin.preset.model import Location

Scalar = str | int | float | bool | None
Key = str | int
Path = tuple[Key, ...]


@dataclasses.dataclass(frozen=True)
class Node:
    """A mapping, a sequence or a scalar, and the place that it came from.

    Attributes:
        value: `dict` of nodes, `list` of nodes, or a scalar; not modified once built.
        location: file, line and key as written, so that it stays right when files are merged.
    """

    value: dict[str, Node] | list[Node] | Scalar
    location: Location

    def plain(self) -> Any:
        """The same data without locations."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def child(self, key: Key) -> Node | None:
        """The entry of a mapping or the item of a sequence, or None where there is none."""
        if isinstance(self.value, dict) and isinstance(key, str):
            return self.value.get(key)
        if isinstance(self.value, list) and isinstance(key, int) and 0 <= key < len(self.value):
            return self.value[key]
        return None

    def locate(self, path: Path) -> Location:
        """Where `path` was written; where it was not, the nearest thing around it that was."""
        node, depth = self, 0
        while depth < len(path) and (below := node.child(path[depth])) is not None:
            node, depth = below, depth + 1
        key = join_path(path[depth:], node.location.key)
        return dataclasses.replace(node.location, key=key)

    def at(self, path: Path) -> Node | None:
        """The node at a path, or None where there is none."""
        node: Node | None = self
        for key in path:
            node = node.child(key) if node is not None else None
        return node

    def locations(self, path: Path) -> list[Location]:
        """The locations of all scalars at and below `path`; those of overrides differ."""
        node = self.at(path)
        return [scalar.location for _, scalar in node.scalars()] if node is not None else []

    def scalars(self, path: Path = ()) -> Iterator[tuple[Path, Node]]:
        """Every scalar below this node with its path."""
        if isinstance(self.value, dict):
            for key, node in self.value.items():
                yield from node.scalars((*path, key))
        elif isinstance(self.value, list):
            for index, node in enumerate(self.value):
                yield from node.scalars((*path, index))
        else:
            yield path, self


def join_path(path: Path, start: str = "") -> str:
    """Write a path as people do: `rules[2].group_size`."""
    text = start
    for key in path:
        if isinstance(key, int):
            text += f"[{key}]"
        else:
            text += f".{key}" if text else key
    return text


def node_from_plain(data: Any, location: Location) -> Node:
    """Wrap plain data, every part of it at one location."""
    if isinstance(data, dict):
        return Node(
            {key: node_from_plain(value, location) for key, value in data.items()}, location
        )
    if isinstance(data, list):
        return Node([node_from_plain(value, location) for value in data], location)
    return Node(data, location)
