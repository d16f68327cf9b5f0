"""Checks a preset against schemas/preset.schema.json and words what it finds."""

from __future__ import annotations

import copy
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
from mixedprec_plugin.names import nearest
from mixedprec_plugin.preset.findings import Findings
from mixedprec_plugin.preset.tree import Node, Path
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
_EXAMPLES = {
    "match": 'match: "*.q_proj"',
    "path": "path: FOLDER",
    "version": "version: 1",
}
# keys of a scheme that are no argument of its method
SCHEME_KEYS = ("method", "source", "requantize")
_UNQUOTE = "leave the quotes out"
_FIXED: Mapping[str, Any] = {AUTO: {"requantize": {"const": False}}}
_PARTS = ("version", "extends", "sources", "schemes", "lists", "rules")


def check_file(tree: Node, findings: Findings) -> None:
    """Check what merging relies on in one file: its version, and the types of its parts."""
    _report(_file_validator(), tree.plain(), tree, findings)


def check_preset(data: Any, tree: Node, findings: Findings) -> None:
    """Check a merged preset.

    Args:
        data: the preset with its interpolations resolved.
        tree: the same before that, for the locations.
    """
    _report(_preset_validator(), data, tree, findings)


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
    schema = preset_schema(())
    parts = copy.deepcopy({key: schema["properties"][key] for key in _PARTS})
    for key in ("sources", "schemes", "lists", "rules"):
        parts[key] = {"type": parts[key]["type"]}
    return Draft202012Validator({"required": ["version"], "properties": parts})


def _report(validator: Validator, data: Any, tree: Node, findings: Findings) -> None:
    errors = list(validator.iter_errors(data))
    mistyped = {tuple(error.absolute_path) for error in errors if error.validator == "type"}
    for error in errors:
        path: Path = tuple(error.absolute_path)
        if path in mistyped and error.validator in ("enum", "const"):
            continue
        for key, what, remedy, rule in _describe(error, path):
            location = tree.locate((*path, *key))
            if findings.is_muted(location):
                continue
            if remedy == _UNQUOTE and _is_from_environment(tree, path):
                remedy = "environment variables are text; override the key on the command line"
            findings.add(location, what, remedy, f"schema-{rule}")


def _is_from_environment(tree: Node, path: Path) -> bool:
    node = tree.at(path)
    return node is None or "${" in str(node.value)


_Finding = tuple[tuple[str, ...], str, str, str]


def _describe(error: ValidationError, path: Path) -> list[_Finding]:
    """What an error of the validator means: (key below its path, what, remedy, rule)."""
    value: Any = error.instance
    expected: Any = error.validator_value
    rule = str(error.validator)
    if rule in ("unevaluatedProperties", "additionalProperties"):
        return _unknown_keys(value, error.schema, path)
    if rule == "required":
        missing = [key for key in expected if key not in value and f"'{key}'" in error.message]
        return [((), *_missing_key(key, path), rule) for key in missing]
    if rule == "type":
        kinds = [expected] if isinstance(expected, str) else expected
        wanted = " or ".join(_TYPES[kind] for kind in kinds)
        return [((), f"{show(value)} is {_kind(value)} (expected {wanted})", "", rule)]
    if rule == "enum":
        return [((), *_not_one_of(value, expected, path), rule)]
    if rule == "const" and path == ("version",):
        what = f"{show(value)} is not a version of the preset language (expected {expected})"
        return [((), what, "", rule)]
    if rule == "const":
        return [((), f"{show(value)} is not {show(expected)}", "", rule)]
    if rule in ("minItems", "minLength"):
        return [((), f"{show(value)} is empty (expected at least one)", "", rule)]
    if rule == "pattern" and "${" in str(expected).replace("\\", ""):
        return [((), f"{show(value)} is text (expected a mapping)", "", "type")]
    if rule == "pattern":
        what = f"{show(value)} is not a name (expected letters, digits, '_' and '-')"
        return [((str(value),), what, "", rule)]
    if rule == "not":
        what = "the name 'model' is taken: it is the server's --model-path"
        return [((str(value),), what, "choose another", rule)]
    return [((), error.message, "", rule)]


def _missing_key(key: str, path: Path) -> tuple[str, str]:
    if key == "method" and _is_rule(path):
        return "no method is named", "add 'method:' with its arguments, or 'scheme:'"
    example = _EXAMPLES.get(key, f"{key}: …")
    return f"{key!r} is missing", f"add '{example}'"


def _not_one_of(value: Any, expected: list[Any], path: Path) -> tuple[str, str]:
    if path and path[-1] == "method" and isinstance(value, str):
        near = nearest(value, method_names())
        what = f"unknown method {value!r} (expected {', '.join(METHODS)})"
        return what, f"did you mean {_either(near)}?" if near else ""
    choices = ", ".join(show(choice) for choice in expected)
    if len(expected) == 1:
        return f"{show(value)} is not {choices}", ""
    near = (
        nearest(value, [c for c in expected if isinstance(c, str)])
        if isinstance(value, str)
        else []
    )
    if isinstance(value, str) and value in {show(choice) for choice in expected}:
        return f"{show(value)} is text and not one of {choices}", _UNQUOTE
    return f"{show(value)} is not one of {choices}", f"did you mean {_either(near)}?" * bool(near)


def _unknown_keys(value: Mapping[str, Any], schema: Any, path: Path) -> list[_Finding]:
    """One problem for each key that the schema knows nothing of.

    The validator also counts keys whose own value is wrong; those have their problem already.
    """
    known = list(schema.get("properties", {}))
    is_rule, is_scheme = _is_rule(path), path[:1] == ("schemes",)
    if is_rule and "scheme" in value:
        known.append("scheme")
    elif is_rule or is_scheme:
        known += [key for key in SCHEME_KEYS if key not in known]
        spec = _method(value.get("method"))
        if spec is None:
            return []
        known += spec.defaults
    found: list[_Finding] = []
    for key in value:
        if key in known:
            continue
        near = nearest(key, known)
        remedy = f"did you mean {_either(near)}?" if near else ""
        what = f"unknown key {key!r} (expected {', '.join(known)})"
        if is_rule and "scheme" in value and _belongs_to_a_method(key):
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


def _either(names: list[str]) -> str:
    return " or ".join(repr(name) for name in names)
