"""What a conversion is made of, so that only the same one is continued."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixedprec_plugin import __version__
from mixedprec_plugin.checkpoint.headers import CHANGED, StoredTensor
from mixedprec_plugin.checkpoint.hub import fetch_if_missing
from mixedprec_plugin.convert.parts import Part
from mixedprec_plugin.errors import CheckpointError, Problem
from mixedprec_plugin.plan.model import Plan, PlannedLayer

# raised whenever the same inputs would give other files
LAYOUT_VERSION = 1


def input_facts(plan: Plan, form: str, parts: Sequence[Part]) -> dict[str, str]:
    """Everything that decides a byte of the output, each kind of it as one digest.

    Files of the sources are known by size and time of their last change, not by their bytes.

    Returns:
        what it is, in words -> digest; two conversions are the same if all are.
    """
    paths = sorted({tensor.path for layer in plan.layers for tensor in _read(layer)})
    return {
        "the release": f"{__version__} layout {LAYOUT_VERSION}",
        "the format": form,
        "the dtype": plan.target.dtype,
        "the preset": _digest(plan.preset.resolved),
        "config.json": _digest(_configs(plan)),
        "the sources' files": _digest([_identity(path) for path in paths]),
        "the size of parts": _digest([[part.file, len(part.tensors)] for part in parts]),
        "the plan": _digest([part.header.decode("latin-1") for part in parts]),
    }


def _identity(path: Path) -> list[object]:
    """A source's file, downloaded if the cache has not got it.

    Raises:
        CheckpointError: it cannot be had.
    """
    fetch_if_missing(path)
    try:
        stat = path.stat()
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
        raise CheckpointError(Problem(str(path), what, CHANGED, "file")) from error
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


def _configs(plan: Plan) -> list[object]:
    """The model's, and of other sources what layers under `auto` are written with."""
    said = {name: dict(source.quantization_config) for name, source in plan.sources.items()}
    return [dict(plan.source.config), said]


def _read(layer: PlannedLayer) -> list[StoredTensor]:
    norms = [layer.rescale.own, layer.rescale.served] if layer.rescale else []
    return [*layer.inputs.values(), *norms]


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """What differs between two conversions, in words."""
    return [key for key in now if before.get(key) != now[key]]
