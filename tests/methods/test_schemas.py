from __future__ import annotations

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from mixedprec_plugin.methods.registry import METHODS, bind, method_names
from mixedprec_plugin.preset.schema import schema_files
from mixedprec_plugin.resources import schema_path


def schema_of(method: str) -> dict[str, Any]:
    text = (schema_path("methods") / f"{method}.schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def test_each_method_has_a_schema_and_each_schema_a_method() -> None:
    files = {path.name for path in schema_path("methods").iterdir()}
    assert files == {f"{name}.schema.json" for name in METHODS}


def test_files_are_what_the_methods_say() -> None:
    for path, text in schema_files().items():
        assert path.read_text(encoding="utf-8") == text, "run 'make schemas'"


@pytest.mark.parametrize("method", METHODS)
def test_schema_is_a_valid_schema(method: str) -> None:
    Draft202012Validator.check_schema(schema_of(method))


@pytest.mark.parametrize("method", METHODS)
def test_schema_has_the_methods_arguments_and_defaults(method: str) -> None:
    properties = schema_of(method)["properties"]
    assert {name: p["default"] for name, p in properties.items()} == METHODS[method].defaults


@pytest.mark.parametrize("method", METHODS)
def test_every_argument_has_a_description_and_an_enum_with_its_default(method: str) -> None:
    for argument in schema_of(method)["properties"].values():
        assert argument["description"].endswith(".")
        assert argument["default"] in argument["enum"]


@pytest.mark.parametrize("name", method_names())
def test_what_every_name_binds_to_is_valid(name: str) -> None:
    method, arguments = bind(name, {})
    Draft202012Validator(schema_of(method)).validate(arguments)


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("bf16", {"dtype": "float32"}),
        ("bf16", {"bits": 16}),
        ("fp8", {"weight_block_size": [64, 64]}),
        ("fp8", {"weight_block_size": 128}),
        ("fp8", {"activation_scheme": "none"}),
        ("fp8", {"weight_bits": 8}),
        ("blockwise_int8", {"weight_block_size": None}),
        ("blockwise_int8", {"activation_scheme": "static"}),
        ("blockwise_int8", {"bits": 8}),
        ("awq", {"bits": 8}),
        ("awq", {"group_size": 16}),
        ("awq", {"zero_point": False}),
        ("awq", {"zero_point": 1}),
        ("awq", {"rounding": "yes"}),
        ("awq", {"sym": True}),
        ("gptq", {"bits": 3}),
        ("gptq", {"group_size": "128"}),
        ("gptq", {"group_size": 100}),
        ("gptq", {"sym": False}),
        ("gptq", {"desc_act": "yes"}),
        ("gptq", {"rounding": None}),
        ("gptq", {"zero_point": True}),
    ],
)
def test_schema_rejects(method: str, arguments: dict[str, Any]) -> None:
    assert not Draft202012Validator(schema_of(method)).is_valid(arguments)
