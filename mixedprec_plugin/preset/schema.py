"""Checks a preset against schemas/preset.schema.json and words what it finds.

python -m mixedprec_plugin.preset.schema writes schemas/ by what the methods know.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path as FilePath
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from jsonschema.protocols import Validator

from mixedprec_plugin.methods.interface import Method
from mixedprec_plugin.methods.registry import AUTO, BUILT_IN, METHODS, suggest_method
from mixedprec_plugin.preset.document import Document, Findings, Path, at, is_within
from mixedprec_plugin.preset.interpolation import is_interpolated
from mixedprec_plugin.resources import schema_path

PRESET_SCHEMA = "preset.schema.json"
# keys of a scheme that are no argument of its method
SCHEME_KEYS = ("method", "source", "requantize")

_TYPES = {
    "object": "a mapping",
    "array": "a list",
    "string": "text",
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "null": "null",
}
_KINDS: Mapping[type, str] = {
    dict: "a mapping", list: "a list", str: "text", bool: "a boolean", type(None): "nothing",
}  # fmt: skip
_EXAMPLES = {"match": 'match: "*.q_proj"', "path": "path: FOLDER", "version": "version: 1"}
_UNQUOTE = "leave the quotes out"
# a layer that runs as it is stored is never rounded again
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
        value = at(shown, path) if error.instance == at(data, path) else error.instance
        for place, what, remedy, rule in _describe(error, value, path, document.findings):
            if is_within(place, muted):
                continue
            if remedy == _UNQUOTE and is_interpolated(at(document.data, path)):
                remedy = "environment variables are text; override the key on the command line"
            document.report(place, what, remedy, f"schema-{rule}")


def _describe(
    error: ValidationError, value: Any, path: Path, findings: Findings
) -> Iterator[tuple[Path, str, str, str]]:
    """What an error of the validator at a path means: (where, what, remedy, rule).

    `value` is what is wrong, as messages may show it.
    """
    expected: Any = error.validator_value
    rule, remedy = str(error.validator), ""
    if rule in ("unevaluatedProperties", "additionalProperties"):
        yield from _unknown_keys(error, path, findings)
        return
    match rule:
        case "required":
            (key,) = (key for key in expected if f"'{key}'" in error.message)
            what, remedy = f"{key!r} is missing", f"add '{_EXAMPLES.get(key, f'{key}: …')}'"
            if key == "method" and _is_rule(path):
                what = "no method is named"
                remedy = "add 'method:' with its arguments, or 'scheme:'"
        case "enum":
            what, remedy = _not_one_of(error, value, path, findings)
        case "pattern" if "${" in str(expected).replace("\\", ""):
            what, rule = f"{show(value)} is text (expected a mapping)", "type"
        case "pattern":
            path = (*path, str(value))
            what = f"{show(value)} is not a name (expected letters, digits, '_' and '-')"
        case "not":
            path = (*path, str(value))
            what = "the name 'model' is taken: it is the server's --model-path"
            remedy = "choose another"
        case "type":
            kinds = [expected] if isinstance(expected, str) else expected
            wanted = " or ".join(_TYPES[kind] for kind in kinds)
            kind = _KINDS.get(type(value), "a number")
            what = f"{show(value)} is {kind} (expected {wanted})"
        case "const" if path == ("version",):
            what = f"{show(value)} is not a version of the preset language (expected {expected})"
        case "const":
            what = f"{show(value)} is not {show(expected)}"
        case "minItems" | "minLength":
            what = f"{show(value)} is empty (expected at least one)"
        case _:
            what = f"{show(value)} does not fit (expected {rule} {show(expected)})"
    yield path, what, remedy, rule


def _not_one_of(
    error: ValidationError, value: Any, path: Path, findings: Findings
) -> tuple[str, str]:
    expected: Any = error.validator_value
    if path and path[-1] == "method" and isinstance(value, str):
        what = f"unknown method {value!r} (expected {', '.join(METHODS)})"
        return what, suggest_method(value)
    choices = ", ".join(map(show, expected))
    if len(expected) == 1:
        return f"{show(value)} is not {choices}", ""
    if isinstance(value, str) and error.instance in [show(choice) for choice in expected]:
        return f"{show(value)} is text and not one of {choices}", _UNQUOTE
    texts = [choice for choice in expected if isinstance(choice, str)]
    remedy = findings.suggest(value, texts) if isinstance(value, str) else ""
    return f"{show(value)} is not one of {choices}", remedy


def _unknown_keys(
    error: ValidationError, path: Path, findings: Findings
) -> Iterator[tuple[Path, str, str, str]]:
    """One problem for each key that the schema knows nothing of.

    The validator also counts keys whose own value is wrong; those have their problem already.
    """
    value: Any = error.instance
    schema: Any = error.schema
    known = [key for key in schema.get("properties", {}) if key != "scheme"]
    has_scheme = _is_rule(path) and "scheme" in value
    if has_scheme:
        known.append("scheme")
    elif _is_rule(path) or path[:1] == ("schemes",):
        name = value.get("method")
        method = next((method for method in METHODS.values() if name in method.names), None)
        if method is None:
            return
        known = list(dict.fromkeys([*known, *SCHEME_KEYS, *method.defaults]))
    of_methods = {*SCHEME_KEYS, *(key for method in METHODS.values() for key in method.defaults)}
    for key in value:
        if key in known:
            continue
        what = f"unknown key {key!r} (expected {', '.join(known)})"
        remedy = findings.suggest(key, known)
        if has_scheme and key in of_methods:
            what = f"{key!r} does not go with 'scheme'"
            remedy = "name a scheme, or a method with its arguments, not both"
        yield (*path, key), what, remedy, "unknown-key"


def _is_rule(path: Path) -> bool:
    return path[:1] == ("rules",) or path[:2] == ("draft", "rules")


def show(value: Any) -> str:
    """Write a value as YAML would, in one short line."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}…"


def schema_files() -> dict[FilePath, str]:
    """Return the text of every file below schemas/, which editors and other tools read, by path."""
    schemas = {schema_path(PRESET_SCHEMA): preset_schema(BUILT_IN.values())}
    for method in BUILT_IN.values():
        path = schema_path("methods") / f"{method.name}.schema.json"
        schemas[path] = {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": f"Arguments of method {method.name}",
            "description": method.description,
            "type": "object",
            "properties": dict(method.schema),
            "additionalProperties": False,
        }
    return {
        path: json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
        for path, schema in schemas.items()
    }


if __name__ == "__main__":
    for path, text in schema_files().items():
        path.write_text(text, encoding="utf-8")
