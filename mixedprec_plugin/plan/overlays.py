"""Numbers of layers from elsewhere, to be shown over a plan: measured errors, predicted losses.

Of `mixedprec verify --json` the relative error of each layer, of a calibrated conversion
(mixedprec_calibration.json) its predicted loss in nats a token, and of the scores of `mixedprec
search` what its unit costs in the scheme that the plan gives it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mixedprec_plugin.checkpoint.files import read_json
from mixedprec_plugin.checkpoint.recorded import CALIBRATION_NAME
from mixedprec_plugin.errors import Problem, UsageError
from mixedprec_plugin.families.names import scheme_unit
from mixedprec_plugin.plan.model import Plan, PlannedLayer

# key of a layer's record -> what it is, and its unit
_VALUES = {"relative_error": ("relative error", ""), "loss": ("predicted loss", "nats a token")}


def read_overlay(path: Path, plan: Plan) -> dict[str, Any]:
    """Read a number for each layer of a plan, from one of these files or a conversion's folder.

    Returns:
        "name" of what it is, "unit", "file", and "values": layer name -> number.
    Raises:
        CheckpointError: it cannot be read, or is no JSON.
        UsageError: it is no such file, or of another model.
    """
    file = path / CALIBRATION_NAME if path.is_dir() else path
    data = read_json(file)
    if isinstance(data.get("scores"), dict):
        found, (name, unit) = dict(_scores(data["scores"], plan)), _VALUES["loss"]
        is_weighed = isinstance(data.get("facts"), dict) and data["facts"].get("gradients", True)
        unit = unit if is_weighed else "share of the outputs"
    else:
        records = data.get("layers")
        if not isinstance(records, list) or not all(isinstance(one, dict) for one in records):
            raise _unknown(file, "it has neither layers nor scores")
        key = next((key for key in _VALUES if any(key in one for one in records)), "")
        if not key:
            raise _unknown(file, f"its layers have neither {' nor '.join(_VALUES)}")
        found, (name, unit) = dict(_records(records, key)), _VALUES[key]
    if not found.keys() & plan.by_name.keys():
        raise _unknown(file, "it names no layer of this model")
    return {"name": name, "unit": unit, "file": str(file), "values": found}


def _records(records: list[Mapping[str, Any]], key: str) -> Iterator[tuple[str, float]]:
    for one in records:
        value = one.get(key)
        if isinstance(value, int | float) and math.isfinite(value):
            yield str(one.get("layer")), float(value)


def _scores(scores: Mapping[str, Any], plan: Plan) -> Iterator[tuple[str, float]]:
    """Each layer with what its unit costs in its scheme, where that was scored."""
    for layer in plan.layers:
        of_unit = scores.get(scheme_unit(layer.module, layer.shard))
        if layer.scheme is None or not isinstance(of_unit, dict):
            continue
        for key, value in of_unit.items():
            if isinstance(value, int | float) and _is_of(key, layer):
                yield layer.name, float(value)


def _is_of(key: str, layer: PlannedLayer) -> bool:
    """Whether a score, kept under [method, arguments, source] as JSON, is of a layer's scheme."""
    assert layer.scheme is not None
    try:
        (method, arguments, source), _ = json.JSONDecoder().raw_decode(key)
    except ValueError:
        return False
    own = layer.scheme.arguments
    # what a scheme leaves to the source is filled in where it is planned
    is_same = all(value is None or own.get(name) == value for name, value in arguments.items())
    return bool(method == layer.scheme.method and source == layer.source and is_same)


def _unknown(file: Path, why: str) -> UsageError:
    remedy = (
        "name what mixedprec verify --json printed, a file of mixedprec search's scores, or a "
        "folder that mixedprec convert --calibrate wrote"
    )
    return UsageError(Problem("--overlay", f"{file} has no numbers of layers: {why}", remedy))
