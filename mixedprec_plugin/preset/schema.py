"""Checks a preset against schemas/preset.schema.json and words what it finds."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from jsonschema.protocols import Validator

from mixedprec_plugin.methods.interface import Method
from mixedprec_plugin.methods.registry import AUTO, METHODS, method_names
from mixedprec_plugin.preset.document import Document, Findings, Path, at, is_within
from mixedprec_plugin.preset.interpolation import is_interpolated
from mixedprec_plugin.resources import schema_path

PRESET_SCHEMA = "preset.schema.json"

_TYPES = {
    "object": "a mapping",
    "array": "a list",
    "string": "text",
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "null": "null",
}
_EXAMPLES = {"match": 'match: "*.q_proj"', "path": "path: FOLDER", "version": "version: 1"}
# keys of a scheme that are no argument of its method
SCHEME_KEYS = ("method", "source", "requantize")
_UNQUOTE = "leave the quotes out"
_FIXED: Mapping[str, Any] = {AUTO: {"requantize": {"const": False}}}


def check_file(document: Document) -> None:
    """Check what merging relies on in one file: its version, and the types of its parts."""
    _report(_file_validator(), document.data, document.data, document)


def check_preset(data: Any, shown: Any, document: Document) -> None:
    """Check a merged preset.

    Args:
        data: the preset with its interpolations resolved.
        shown: the same as messages may show it.
        document: the same before that, for the places.
    """
    _report(_preset_validator(), data, shown, document)


def preset_schema(methods: Iterable[Method]) -> dict[str, Any]:
    """The preset's schema, with the names and arguments of these methods."""
    schema: dict[str, Any] = json.loads(schema_path(PRESET_SCHEMA).read_text(encoding="utf-8"))
    methods = tuple(methods)
    schema["$defs"]["method"]["enum"] = [name for method in methods for name in method.names]
    schema["$defs"]["method_arguments"]["allOf"] = [
        {
            "if": {"properties": {"method": {"enum": list(method.names)}}, "required": ["method"]},
            # a layer that runs as it is stored is never rounded again
            "then": {"properties": {**_FIXED.get(method.name, {}), **method.schema}},
        }
        for method in methods
    ]
    return schema


@functools.cache
def _preset_validator() -> Validator:
    return Draft202012Validator(preset_schema(METHODS.values()))


@functools.cache
def _file_validator() -> Validator:
    whole = preset_schema(())["properties"]
    parts = {key: {"type": whole[key]["type"]} for key in ("sources", "schemes", "lists", "rules")}
    parts |= {key: whole[key] for key in ("version", "extends")}
    return Draft202012Validator({"required": ["version"], "properties": parts})


def _report(validator: Validator, data: Any, shown: Any, document: Document) -> None:
    muted = set(document.broken)
    errors = list(validator.iter_errors(data))
    mistyped = {tuple(error.absolute_path) for error in errors if error.validator == "type"}
    for error in errors:
        path: Path = tuple(error.absolute_path)
        if path in mistyped and error.validator in ("enum", "const"):
            continue
        real = at(data, path)
        value = at(shown, path) if error.instance == real else error.instance
        for key, what, remedy, rule in _describe(error, value, path, document.findings):
            if is_within((*path, *key), muted):
                continue
            if remedy == _UNQUOTE and is_interpolated(at(document.data, path)):
                remedy = "environment variables are text; override the key on the command line"
            document.report((*path, *key), what, remedy, f"schema-{rule}")


_Finding = tuple[tuple[str, ...], str, str, str]


def _describe(error: ValidationError, value: Any, path: Path, findings: Findings) -> list[_Finding]:
    """What an error of the validator means: (key below its path, what, remedy, rule).

    Args:
        value: what is wrong, as messages may show it.
    """
    expected: Any = error.validator_value
    rule = str(error.validator)
    if rule in ("unevaluatedProperties", "additionalProperties"):
        return _unknown_keys(error, path, findings)
    if rule == "required":
        (key,) = (key for key in expected if f"'{key}'" in error.message)
        if key == "method" and _is_rule(path):
            remedy = "add 'method:' with its arguments, or 'scheme:'"
            return [((), "no method is named", remedy, rule)]
        example = _EXAMPLES.get(key, f"{key}: …")
        return [((), f"{key!r} is missing", f"add '{example}'", rule)]
    if rule == "enum":
        return [((), *_not_one_of(error, value, path, findings), rule)]
    if rule == "pattern" and "${" not in str(expected).replace("\\", ""):
        what = f"{show(value)} is not a name (expected letters, digits, '_' and '-')"
        return [((str(value),), what, "", rule)]
    if rule == "not":
        what = "the name 'model' is taken: it is the server's --model-path"
        return [((str(value),), what, "choose another", rule)]
    if rule == "type":
        kinds = [expected] if isinstance(expected, str) else expected
        wanted = " or ".join(_TYPES[kind] for kind in kinds)
        what = f"is {_kind(value)} (expected {wanted})"
    elif rule == "pattern":
        what, rule = "is text (expected a mapping)", "type"
    elif rule == "const" and path == ("version",):
        what = f"is not a version of the preset language (expected {expected})"
    elif rule == "const":
        what = f"is not {show(expected)}"
    elif rule in ("minItems", "minLength"):
        what = "is empty (expected at least one)"
    else:
        what = f"does not fit (expected {rule} {show(expected)})"
    return [((), f"{show(value)} {what}", "", rule)]


def _not_one_of(
    error: ValidationError, value: Any, path: Path, findings: Findings
) -> tuple[str, str]:
    expected: Any = error.validator_value
    if path and path[-1] == "method" and isinstance(value, str):
        what = f"unknown method {value!r} (expected {', '.join(METHODS)})"
        return what, findings.suggest(value, method_names())
    choices = ", ".join(show(choice) for choice in expected)
    if len(expected) == 1:
        return f"{show(value)} is not {choices}", ""
    if not isinstance(value, str):
        return f"{show(value)} is not one of {choices}", ""
    if error.instance in {show(choice) for choice in expected}:
        return f"{show(value)} is text and not one of {choices}", _UNQUOTE
    remedy = findings.suggest(value, [choice for choice in expected if isinstance(choice, str)])
    return f"{show(value)} is not one of {choices}", remedy


def _unknown_keys(error: ValidationError, path: Path, findings: Findings) -> list[_Finding]:
    """One problem for each key that the schema knows nothing of.

    The validator also counts keys whose own value is wrong; those have their problem already.
    """
    value: Any = error.instance
    schema: Any = error.schema
    known = list(schema.get("properties", {}))
    has_scheme = _is_rule(path) and "scheme" in value
    if has_scheme:
        known.append("scheme")
    elif _is_rule(path) or path[:1] == ("schemes",):
        known += [key for key in SCHEME_KEYS if key not in known]
        spec = _method(value.get("method"))
        if spec is None:
            return []
        known += spec.defaults
    found: list[_Finding] = []
    for key in value:
        if key in known:
            continue
        what = f"unknown key {key!r} (expected {', '.join(known)})"
        remedy = findings.suggest(key, known)
        if has_scheme and _belongs_to_a_method(key):
            what = f"{key!r} does not go with 'scheme'"
            remedy = "name a scheme, or a method with its arguments, not both"
        found.append(((key,), what, remedy, "unknown-key"))
    return found


def _is_rule(path: Path) -> bool:
    return path[:1] == ("rules",) or path[:2] == ("draft", "rules")


def _belongs_to_a_method(key: str) -> bool:
    return key in SCHEME_KEYS or any(key in spec.defaults for spec in METHODS.values())


def _method(name: Any) -> Method | None:
    for spec in METHODS.values():
        if name == spec.name or (isinstance(name, str) and name in spec.aliases):
            return spec
    return None


def show(value: Any) -> str:
    """Write a value as YAML would, in one short line."""
    if isinstance(value, str):
        text = repr(value)
    elif isinstance(value, float) and not math.isfinite(value):
        text = str(value)
    else:
        text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "a boolean"
    if value is None:
        return "nothing"
    kinds: dict[type, str] = {dict: "a mapping", list: "a list", str: "text"}
    return kinds.get(type(value), "a number")
