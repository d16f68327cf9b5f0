"""A preset file and the files that it extends: finding, ordering and merging them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path as FilePath
from typing import Any

from mixedprec_plugin.preset.document import Document, Findings, Path
from mixedprec_plugin.preset.interpolation import is_interpolated
from mixedprec_plugin.preset.model import Location
from mixedprec_plugin.preset.reader import read_file
from mixedprec_plugin.resources import preset_dir, preset_names

MAX_FILES = 64

_SUFFIXES = (".yaml", ".yml")


def locate_preset(name: str, folder: FilePath) -> FilePath | None:
    """Find the file that a name stands for; None if there is none.

    Args:
        name: a path, its suffix left out or not, or the name of a packaged preset.
        folder: what the path counts from. A file there comes before a packaged preset.
    """
    beside = folder / name
    for suffix in ("",) if beside.suffix in _SUFFIXES else ("", *_SUFFIXES):
        if os.path.isfile(f"{beside}{suffix}"):
            return FilePath(os.path.normpath(f"{beside}{suffix}"))
    stem = name.removesuffix(".yaml")
    return preset_dir() / f"{stem}.yaml" if stem in preset_names() else None


def find_preset(name: str, findings: Findings) -> FilePath | None:
    """Find the file that the user asked for, as `locate_preset` does, and say if there is none."""
    path = FilePath(name)
    found = locate_preset(name, FilePath())
    if found is not None or path.exists():
        return found or path
    beside = sorted(other.name for other in path.parent.glob("*.yaml"))
    remedy = findings.suggest(path.name, [*beside, *preset_names()])
    is_path = bool(path.suffix) or len(path.parts) > 1
    if is_path and not remedy:
        return path
    packaged = "" if is_path else f", or one of {', '.join(preset_names())}"
    what = f"no such preset (expected a file{packaged})"
    findings.add(Location(name, 0), what, remedy or "give the path of a YAML file", "file")
    return None


def read_with_parents(path: FilePath, findings: Findings) -> list[Document]:
    """Read a preset and everything that it extends.

    Returns:
        The files, parents first; a file that is reached twice stands where it comes first.
    """
    documents: list[Document] = []
    known = {os.path.realpath(path)}

    def read(chain: Sequence[FilePath]) -> None:
        document = read_file(chain[-1], findings)
        identities = [os.path.realpath(link) for link in chain]
        for name, place in _parents(document):
            parent = _find_parent(document, name, place)
            if parent is None:
                continue
            identity = os.path.realpath(parent)
            if identity in identities:
                circle = [*chain[identities.index(identity) :], parent]
                what = f"extends itself: {' -> '.join(map(str, circle))}"
                document.report(place, what, "take one of these 'extends' away", "extends-cycle")
            elif identity not in known and len(known) >= MAX_FILES:
                what = f"more than {MAX_FILES} files extend one another"
                document.report(place, what, "extend fewer", "extends-too-many")
            elif identity not in known:
                known.add(identity)
                read([*chain, parent])
        documents.append(document)

    read([path])
    return documents


def _parents(document: Document) -> Iterator[tuple[str, Path]]:
    """The texts under `extends` with their paths; anything else there is left to the schema."""
    value = document.data.get("extends") if document.data else None
    for index, item in enumerate(value if isinstance(value, list) else [value]):
        path: Path = ("extends", index) if isinstance(value, list) else ("extends",)
        if is_interpolated(item):
            what = f"{item!r} is an interpolation (expected a name or a path)"
            remedy = "parents are read before interpolations; write the name out"
            document.report(path, what, remedy, "extends-interpolation")
        elif isinstance(item, str) and item:
            yield item, path


def _find_parent(document: Document, name: str, place: Path) -> FilePath | None:
    child, packaged = FilePath(document.file), preset_names()
    if found := locate_preset(name, child.parent):
        return found
    siblings = {path.stem for path in child.parent.glob("*.yaml")} - {child.stem}
    remedy = document.findings.suggest(name.removesuffix(".yaml"), sorted({*siblings, *packaged}))
    what = f"there is no preset {name!r} beside this one or among the packaged ones"
    what = f"{what} ({', '.join(packaged)})"
    document.report(place, what, remedy, "extends-missing")
    return None


def merge(documents: Sequence[Document]) -> Document:
    """Merge files, parents first.

    `sources`, `schemes` and `lists` merge by key, `rules` are appended, of any other key the last
    one counts. Parts of the wrong type are left out.
    """
    data: dict[str, Any] = {}
    places: dict[Path, Location] = {}
    broken: set[Path] = set()
    for document in documents:
        rules = data.get("rules")
        num_rules = len(rules) if isinstance(rules, list) else 0
        own = {_moved(path, num_rules): place for path, place in document.places.items()}
        replaced = {path for path in broken if path in own or path[:2] in own}
        broken = broken - replaced | {_moved(path, num_rules) for path in document.broken}
        places.update(own)
        for key, value in document.data.items():
            old = data.get(key)
            if key == "rules" and isinstance(old, list):
                data[key] = old + value if isinstance(value, list) else old
            elif key in ("sources", "schemes", "lists") and isinstance(old, dict):
                data[key] = old | value if isinstance(value, dict) else old
            elif key != "extends":
                data[key] = value
    return Document(documents[-1].file, documents[-1].findings, data, places, broken)


def _moved(path: Path, num_rules: int) -> Path:
    """The path of a part behind the rules of the parents."""
    match path:
        case "rules", int(index), *below:
            return ("rules", index + num_rules, *below)
    return path
