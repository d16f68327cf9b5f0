"""The door of what a checkpoint says of itself: after it, values are of the kinds that tools write.

`schemas/config.schema.json` lists the keys that are read. Numbers are finite and fit 64 bits there.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from jsonschema.protocols import Validator
from jsonschema.validators import extend

from mixedprec_plugin.checkpoint.files import read_json
from mixedprec_plugin.checkpoint.patterns import MAX_PATTERNS, is_plain
from mixedprec_plugin.errors import CheckpointError, Problem
from mixedprec_plugin.resources import schema_path

_MAX_PROBLEMS = 8
_WORDS = {
    "object": "an object", "array": "a list", "string": "text", "boolean": "true or false",
    "integer": "a whole number", "number": "a number", "null": "null",
}  # fmt: skip


def read_config(path: Path) -> dict[str, Any]:
    """Read a checkpoint's config.json.

    Raises:
        CheckpointError: it cannot be read, or says something of a kind that no tool writes.
    """
    config = read_json(path)
    check_record(config, path)
    for section in (config, config.get("text_config") or {}):
        for key in ("quantization_config", "compression_config"):
            _check_patterns(section.get(key), f"{path}: {key}")
    return config


def check_record(record: Mapping[str, Any], path: Path) -> None:
    """Hold a record against its schema.

    Raises:
        CheckpointError: with the first of the keys that are wrong.
    """
    errors = itertools.islice(_validator().iter_errors(record), _MAX_PROBLEMS)
    problems = {_problem(error, path): None for error in errors}
    if problems:
        raise CheckpointError(problems)


def _check_patterns(said: Any, where: str) -> None:
    """Refuse more patterns than are held against every layer's name in bounded time."""
    waiting, count = [said], 0
    for value in waiting:
        if isinstance(value, dict):
            waiting += [part for key in value if key != "preset" for part in (key, value[key])]
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str) and (value.startswith("re:") or not is_plain(value)):
            count += 1
    if count > MAX_PATTERNS:
        what = f"holds {count:,} patterns (expected up to {MAX_PATTERNS:,})"
        raise CheckpointError(Problem(where, what, "write several as one", "record"))


def _problem(error: ValidationError, path: Path) -> Problem:
    key = ""
    for part in error.absolute_path:
        name = str(part) if str(part).isidentifier() else reprlib.repr(part)
        key += f"[{name}]" if isinstance(part, int) or name != part else f".{name}"
    expected: Any = error.validator_value
    what, wanted = reprlib.repr(error.instance), f"{error.validator} {expected}"
    if error.validator == "type":
        kinds = [expected] if isinstance(expected, str) else expected
        wanted = " or ".join(_WORDS[kind] for kind in kinds)
    elif error.validator == "required":
        wanted = f"the keys {' and '.join(expected)}"
    remedy = "correct config.json, or download it again"
    return Problem(
        f"{path}: {key.removeprefix('.')}", f"{what} (expected {wanted})", remedy, "record"
    )


@functools.cache
def _validator() -> Validator:
    schema = json.loads(schema_path("config.schema.json").read_text(encoding="utf-8"))
    types = Draft202012Validator.TYPE_CHECKER.redefine_many(
        {"integer": _is_integer, "number": _is_number}
    )
    validator: type[Validator] = extend(  # type: ignore[no-untyped-call]
        Draft202012Validator, {"items": _check_items}, type_checker=types
    )
    return validator(schema)


def _check_items(validator: Any, items: Any, value: Any, schema: Any) -> Iterator[ValidationError]:
    """The keyword `items`; of lists of text, as long as a model has layers, at once."""
    if items == {"type": "string"} and isinstance(value, list) and set(map(type, value)) <= {str}:
        return
    yield from Draft202012Validator.VALIDATORS["items"](validator, items, value, schema)


def _is_integer(_checker: object, value: Any) -> bool:
    return type(value) is int and abs(value) < 1 << 63


def _is_number(_checker: object, value: Any) -> bool:
    return _is_integer(_checker, value) or (type(value) is float and math.isfinite(value))
