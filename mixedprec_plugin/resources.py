"""The files that ship with the package: schemas, presets and other configuration.

In a checkout they lie beside the package, in a wheel inside it; FileNotFoundError in neither.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path


@functools.cache
def _root(kind: str) -> Path:
    package = Path(__file__).resolve().parent
    for parent in (package, package.parent):
        if (parent / kind).is_dir():
            return parent / kind
    raise FileNotFoundError(
        f"{package / kind}: not there (expected the folder {kind!r} that ships with the package); "
        "install mixedprec-plugin again"
    )


def schema_path(name: str = "") -> Path:
    """Path of a JSON Schema, such as `preset.schema.json`, or of their folder."""
    return _root("schemas") / name


def preset_dir() -> Path:
    """The folder of the presets that ship."""
    return _root("configs") / "presets"


def preset_names() -> tuple[str, ...]:
    """Names of the presets that ship, sorted; each is a file `NAME.yaml` in `preset_dir()`."""
    return tuple(sorted(path.stem for path in preset_dir().glob("*.yaml")))


def page_path(name: str = "page.html") -> Path:
    """The page of `mixedprec plan --html`, without its data, or the colours of its scales."""
    return _root("page") / name


def cache_root() -> Path:
    """Where what can be made again is kept: $MIXEDPREC_CACHE, else ~/.cache/mixedprec."""
    return Path(os.environ.get("MIXEDPREC_CACHE") or Path.home() / ".cache" / "mixedprec")
