"""A preset file and its parents: finding, ordering and merging them."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path as FilePath

from mixedprec_plugin.names import nearest
from mixedprec_plugin.preset.findings import Findings
from mixedprec_plugin.preset.model import Location
from mixedprec_plugin.preset.reader import read_file
from mixedprec_plugin.preset.tree import Node
from mixedprec_plugin.resources import preset_dir, preset_names

MAX_FILES = 64

_SUFFIXES = (".yaml", ".yml")
_MERGED_BY_KEY = ("sources", "schemes", "lists")


@dataclasses.dataclass
class Member:
    """One file of a family, in the order of merging."""

    file: str
    tree: Node | None


def find_preset(name: str, findings: Findings) -> FilePath | None:
    """Find the file that the user asked for: a path, or the bare name of a packaged preset."""
    path = FilePath(name)
    if path.is_file() or len(path.parts) != 1:
        return path
    if name in preset_names():
        return preset_dir() / f"{name}.yaml"
    if path.suffix or path.exists():
        return path
    near = nearest(name, preset_names())
    remedy = f"did you mean {_either(near)}?" if near else "give the path of a YAML file"
    what = f"no such preset (expected a file, or one of {', '.join(preset_names())})"
    findings.add(Location(name, 0), what, remedy, "file")
    return None


def read_family(path: FilePath, findings: Findings) -> list[Member]:
    """Read a preset and everything that it extends.

    Returns:
        The files, parents first; a file that is reached twice stands where it comes first.
    """
    family = _Family(findings)
    family.visit(path, None, ())
    return family.members


class _Family:
    def __init__(self, findings: Findings) -> None:
        self.findings = findings
        self.members: list[Member] = []
        self.done: set[str] = set()
        self.num_read = 0

    def visit(self, path: FilePath, asked_at: Location | None, chain: tuple[FilePath, ...]) -> None:
        identity = os.path.realpath(path)
        identities = [os.path.realpath(link) for link in chain]
        if asked_at is not None and identity in identities:
            circle = [*chain[identities.index(identity) :], path]
            what = f"extends itself: {' -> '.join(str(link) for link in circle)}"
            self.findings.add(asked_at, what, "take one of these 'extends' away", "extends-cycle")
            return
        if identity in self.done:
            return
        self.done.add(identity)
        self.num_read += 1
        if self.num_read > MAX_FILES and asked_at is not None:
            what = f"more than {MAX_FILES} files in one family of presets"
            self.findings.add(asked_at, what, "extend fewer", "extends-too-many")
            return
        tree = read_file(path, self.findings)
        if tree is not None:
            for name, location in self._parents(tree):
                parent = self._find(name, location, path)
                if parent is not None:
                    self.visit(parent, location, (*chain, path))
        self.members.append(Member(str(path), tree))

    def _parents(self, tree: Node) -> list[tuple[str, Location]]:
        """The texts under `extends`; anything else there is left to the schema."""
        node = tree.child("extends")
        if node is None:
            return []
        items = node.value if isinstance(node.value, list) else [node]
        parents = []
        for item in items:
            if isinstance(item.value, str) and "${" in item.value:
                what = f"{item.value!r} is an interpolation (expected a name or a path)"
                remedy = "parents are read before interpolations; write the name out"
                self.findings.add(item.location, what, remedy, "extends-interpolation")
            elif isinstance(item.value, str) and item.value:
                parents.append((item.value, item.location))
        return parents

    def _find(self, name: str, location: Location, child: FilePath) -> FilePath | None:
        beside = child.parent / name
        candidates = [beside]
        if beside.suffix not in _SUFFIXES:
            candidates = [beside.with_name(beside.name + suffix) for suffix in _SUFFIXES]
        for candidate in candidates:
            if candidate.is_file():
                return FilePath(os.path.normpath(candidate))
        stem = name.removesuffix(".yaml")
        if stem in preset_names():
            return preset_dir() / f"{stem}.yaml"
        siblings = {path.stem for path in child.parent.glob("*.yaml")} - {child.stem}
        near = nearest(stem, sorted(siblings | set(preset_names())))
        remedy = f"did you mean {_either(near)}?" if near else ""
        what = (
            f"there is no preset {name!r} beside this one or among the packaged ones "
            f"({', '.join(preset_names())})"
        )
        self.findings.add(location, what, remedy, "extends-missing")
        return None


def merge(members: list[Member]) -> Node:
    """Merge trees, parents first.

    `sources`, `schemes` and `lists` merge by key, `rules` are appended, of any other key the last
    one counts. Parts of the wrong type are left out.
    """
    merged: dict[str, Node] = {}
    location = Location("", 0)
    for member in members:
        if member.tree is None or not isinstance(member.tree.value, dict):
            continue
        location = member.tree.location
        for key, node in member.tree.value.items():
            if key == "extends":
                continue
            merged[key] = _merge_key(key, merged.get(key), node)
    return Node(merged, location)


def _merge_key(key: str, parent: Node | None, child: Node) -> Node:
    if parent is None:
        return child
    if key in _MERGED_BY_KEY:
        if isinstance(parent.value, dict) and isinstance(child.value, dict):
            return Node({**parent.value, **child.value}, child.location)
        return child if isinstance(child.value, dict) else parent
    if key == "rules":
        if isinstance(parent.value, list) and isinstance(child.value, list):
            return Node([*parent.value, *child.value], child.location)
        return child if isinstance(child.value, list) else parent
    return child


def _either(names: list[str]) -> str:
    return " or ".join(repr(name) for name in names)
