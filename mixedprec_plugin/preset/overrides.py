"""Overrides from the command line, `schemes.experts.group_size=64`, as OmegaConf's dotlists."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf

from mixedprec_plugin.preset.document import Document, Path, RefusedError, join_path
from mixedprec_plugin.preset.interpolation import is_interpolated
from mixedprec_plugin.preset.model import Location
from mixedprec_plugin.preset.reader import MAX_DEPTH, read_value

FLAG = "--mixedprec-set"

_PART = r"[A-Za-z0-9_-]+"
_KEY = re.compile(rf"{_PART}(\.{_PART}|\[{_PART}\]){{0,{MAX_DEPTH - 1}}}")


def apply_overrides(document: Document, overrides: Sequence[str]) -> None:
    """Set every `KEY=VALUE` in a document, in order.

    A mapping is merged into the mapping that is there, a list replaces the list, an item of a list
    is reached by its number (`rules.0.method`, `rules[0].method`) and must exist.
    """
    for override in overrides:
        place = Location(f"{FLAG} {override}", 0)
        try:
            _apply(document, override, place)
        except RefusedError as error:
            what, remedy, _ = error.args
            document.findings.add(place, what, remedy, "override")


def _apply(document: Document, override: str, place: Location) -> None:
    key, equals, text = override.partition("=")
    if not equals or not _KEY.fullmatch(key):
        what = "is not an override (expected KEY=VALUE, such as schemes.experts.group_size=64)"
        raise RefusedError(what)
    keys = re.findall(_PART, key)
    if keys[0] == "extends":
        what = "the key 'extends' cannot be overridden"
        raise RefusedError(what, "parents are read first; change the file")
    if text.startswith("*"):  # a pattern, for YAML an alias
        text = json.dumps(text, ensure_ascii=False)
    value = read_value(text, place.file, document.findings)
    if value is None:
        return
    path = _locate(document.data, keys)
    config = OmegaConf.create(document.data)
    OmegaConf.update(config, join_path(path), value.data)
    document.data = OmegaConf.to_container(config)
    for length in range(1, len(path)):
        document.places.setdefault(path[:length], place)
    for below, written in value.places.items():
        document.places[path + below] = written
    for below in value.broken:
        document.mark(path + below)


def _locate(data: Any, keys: Sequence[str]) -> Path:
    """The path that a key of an override means; parts of it that are not there are mappings."""
    path: Path = ()
    for key in keys:
        where = join_path(path)
        if isinstance(data, list):
            if not (key.isdecimal() and len(key) < 10 and int(key) < len(data)):
                what = f"{where} has no item {key!r} (expected a number below {len(data)})"
                raise RefusedError(what)
            path, data = (*path, int(key)), data[int(key)]
        elif isinstance(data, dict):
            path, data = (*path, key), data.get(key, {})
        elif is_interpolated(data):
            what = f"{where} is the interpolation {data!r} and has no {key!r} of its own"
            raise RefusedError(what, "override what it points at, or set it as a whole")
        else:
            raise RefusedError(f"{where} is {data!r} and has no {key!r}")
    return path
