from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from mixedprec_plugin.methods.registry import METHODS, method_names
from mixedprec_plugin.preset.schema import preset_schema
from mixedprec_plugin.resources import schema_path
from tests.preset.conftest import Refuse

TOP_KEYS = (
    "version, description, extends, sources, schemes, lists, rules, draft, kv_cache, "
    "on_fused_conflict, trust_sources, untie_lm_head"
)
METHOD_NAMES = (
    "bf16, fp8, fp8_channel, blockwise_int8, int8_channel, awq, gptq, humming, nvfp4, mxfp4, auto"
)

RULES = "rules: [{match: '*', method: awq}]\n"

# Every rule of the schema once: what breaks it, and all that is said about it.
REJECTED = [
    # the preset
    ("description: x\n" + RULES, ["p.yaml:1: 'version' is missing; add 'version: 1'"]),
    (
        "version: 2\n" + RULES,
        ["p.yaml:1: version: 2 is not a version of the preset language (expected 1)"],
    ),
    (
        "version: true\n" + RULES,
        ["p.yaml:1: version: true is not a version of the preset language (expected 1)"],
    ),
    (
        "version: 1\nrulse: []\n" + RULES,
        [f"p.yaml:2: rulse: unknown key 'rulse' (expected {TOP_KEYS}); did you mean 'rules'?"],
    ),
    (
        "version: 1\ndescription: 3\n" + RULES,
        ["p.yaml:2: description: 3 is a number (expected text)"],
    ),
    (
        "version: 1\nextends: 3\n" + RULES,
        ["p.yaml:2: extends: 3 is a number (expected text or a list)"],
    ),
    (
        "version: 1\nextends: [3]\n" + RULES,
        ["p.yaml:2: extends[0]: 3 is a number (expected text)"],
    ),
    (
        "version: 1\nextends: ''\n" + RULES,
        ["p.yaml:2: extends: '' is empty (expected at least one)"],
    ),
    (
        "version: 1\non_fused_conflict: hihgest\n" + RULES,
        [
            "p.yaml:2: on_fused_conflict: 'hihgest' is not one of 'error', 'highest'; "
            "did you mean 'highest'?"
        ],
    ),
    (
        "version: 1\ntrust_sources: 1\n" + RULES,
        ["p.yaml:2: trust_sources: 1 is a number (expected true or false)"],
    ),
    ("version: 1\nrules: {}\n", ["p.yaml:2: rules: {} is a mapping (expected a list)"]),
    ("version: 1\nrules:\n", ["p.yaml:2: rules: null is nothing (expected a list)"]),
    ("version: 1\nrules: []\n", ["p.yaml:1: has no rules (expected at least one)"]),
    # sources
    (
        "version: 1\nsources: []\n" + RULES,
        ["p.yaml:2: sources: [] is a list (expected a mapping)"],
    ),
    (
        "version: 1\nsources: {model: {path: x}}\n" + RULES,
        [
            "p.yaml:2: sources.model: the name 'model' is taken: it is the server's --model-path; "
            "choose another"
        ],
    ),
    (
        "version: 1\nsources: {a b: {path: x}}\n" + RULES,
        [
            "p.yaml:2: sources.a b: 'a b' is not a name (expected letters, digits, '_' and '-')",
        ],
    ),
    (
        "version: 1\nsources: {a: x}\n" + RULES,
        ["p.yaml:2: sources.a: 'x' is text (expected a mapping)"],
    ),
    (
        "version: 1\nsources: {a: {}}\n" + RULES,
        ["p.yaml:2: sources.a: 'path' is missing; add 'path: FOLDER'"],
    ),
    (
        "version: 1\nsources: {a: {path: ''}}\n" + RULES,
        ["p.yaml:2: sources.a.path: '' is empty (expected at least one)"],
    ),
    (
        "version: 1\nsources: {a: {path: 1}}\n" + RULES,
        ["p.yaml:2: sources.a.path: 1 is a number (expected text)"],
    ),
    (
        "version: 1\nsources: {a: {path: x, revision: 1}}\n" + RULES,
        ["p.yaml:2: sources.a.revision: 1 is a number (expected text or null)"],
    ),
    (
        "version: 1\nsources: {a: {path: x, reversion: y}}\n" + RULES,
        [
            "p.yaml:2: sources.a.reversion: unknown key 'reversion' (expected path, revision); "
            "did you mean 'revision'?"
        ],
    ),
    # schemes
    (
        "version: 1\nschemes: []\n" + RULES,
        ["p.yaml:2: schemes: [] is a list (expected a mapping)"],
    ),
    (
        "version: 1\nschemes: {a.b: {method: awq}}\n" + RULES,
        [
            "p.yaml:2: schemes.a.b: 'a.b' is not a name (expected letters, digits, '_' and '-')",
        ],
    ),
    (
        "version: 1\nschemes: {a: awq}\n" + RULES,
        ["p.yaml:2: schemes.a: 'awq' is text (expected a mapping)"],
    ),
    (
        "version: 1\nschemes: {a: [awq]}\n" + RULES,
        ['p.yaml:2: schemes.a: ["awq"] is a list (expected a mapping)'],
    ),
    (
        "version: 1\nschemes: {a: {group_size: 64}}\n" + RULES,
        ["p.yaml:2: schemes.a: 'method' is missing; add 'method: …'"],
    ),
    (
        "version: 1\nschemes: {a: {method: gtpq, group_size: 100}}\n" + RULES,
        [
            f"p.yaml:2: schemes.a.method: unknown method 'gtpq' (expected {METHOD_NAMES}); "
            "did you mean 'gptq'?"
        ],
    ),
    (
        "version: 1\nschemes: {a: {method: 3}}\n" + RULES,
        ["p.yaml:2: schemes.a.method: 3 is a number (expected text)"],
    ),
    (
        "version: 1\nschemes: {a: {method: awq, source: 3}}\n" + RULES,
        ["p.yaml:2: schemes.a.source: 3 is a number (expected text)"],
    ),
    (
        "version: 1\nschemes: {a: {method: awq, gruop_size: 64}}\n" + RULES,
        [
            "p.yaml:2: schemes.a.gruop_size: unknown key 'gruop_size' (expected method, source, "
            "requantize, bits, group_size, zero_point, rounding); did you mean 'group_size'?"
        ],
    ),
    # rules
    (
        "version: 1\nrules: [awq]\n",
        ["p.yaml:2: rules[0]: 'awq' is text (expected a mapping)"],
    ),
    (
        "version: 1\nrules: [{method: awq}]\n",
        ["p.yaml:2: rules[0]: 'match' is missing; add 'match: \"*.q_proj\"'"],
    ),
    (
        "version: 1\nrules: [{match: 3, method: awq}]\n",
        ["p.yaml:2: rules[0].match: 3 is a number (expected text or a list)"],
    ),
    (
        "version: 1\nrules: [{match: [3], method: awq}]\n",
        ["p.yaml:2: rules[0].match[0]: 3 is a number (expected text)"],
    ),
    (
        "version: 1\nrules: [{match: [], method: awq}]\n",
        ["p.yaml:2: rules[0].match: [] is empty (expected at least one)"],
    ),
    (
        "version: 1\nrules: [{match: ['*', ''], method: awq}]\n",
        ["p.yaml:2: rules[0].match[1]: '' is empty (expected at least one)"],
    ),
    (
        "version: 1\nrules: [{match: '', method: awq}]\n",
        ["p.yaml:2: rules[0].match: '' is empty (expected at least one)"],
    ),
    (
        "version: 1\nrules: [{match: '*'}]\n",
        ["p.yaml:2: rules[0]: no method is named; add 'method:' with its arguments, or 'scheme:'"],
    ),
    (
        "version: 1\nrules: [{match: '*', optional: 'yes', method: awq}]\n",
        ["p.yaml:2: rules[0].optional: 'yes' is text (expected true or false)"],
    ),
    (
        "version: 1\nschemes: {a: {method: awq}}\nrules: [{match: '*', scheme: 3}]\n",
        ["p.yaml:3: rules[0].scheme: 3 is a number (expected text)"],
    ),
    (
        "version: 1\nschemes: {a: {method: awq}}\n"
        "rules: [{match: '*', scheme: a, method: awq, bits: 4}]\n",
        [
            "p.yaml:3: rules[0].method: 'method' does not go with 'scheme'; "
            "name a scheme, or a method with its arguments, not both",
            "p.yaml:3: rules[0].bits: 'bits' does not go with 'scheme'; "
            "name a scheme, or a method with its arguments, not both",
        ],
    ),
    (
        "version: 1\nschemes: {a: {method: awq}}\n"
        "rules: [{match: '*', scheme: a, optoinal: true}]\n",
        [
            "p.yaml:3: rules[0].optoinal: unknown key 'optoinal' (expected match, optional, "
            "scheme); did you mean 'optional'?"
        ],
    ),
    (
        "version: 1\nrules: [{match: '*', method: fp8, group_size: 64}]\n",
        [
            "p.yaml:2: rules[0].group_size: unknown key 'group_size' (expected match, optional, "
            "method, source, requantize, weight_block_size, activation_scheme)"
        ],
    ),
    # arguments
    (
        "version: 1\nrules: [{match: '*', method: gptq, group_size: 100}]\n",
        ["p.yaml:2: rules[0].group_size: 100 is not one of 128, 64, 32, -1"],
    ),
    (
        "version: 1\nrules: [{match: '*', method: gptq, group_size: '64'}]\n",
        [
            "p.yaml:2: rules[0].group_size: '64' is text and not one of 128, 64, 32, -1; "
            "leave the quotes out"
        ],
    ),
    (
        "version: 1\nrules: [{match: '*', method: awq, bits: 8}]\n",
        ["p.yaml:2: rules[0].bits: 8 is not 4"],
    ),
    (
        "version: 1\nrules: [{match: '*', method: awq, zero_point: 1}]\n",
        ["p.yaml:2: rules[0].zero_point: 1 is a number (expected true or false)"],
    ),
    (
        "version: 1\nrules: [{match: '*', method: fp8, weight_block_size: [128]}]\n",
        ["p.yaml:2: rules[0].weight_block_size: [128] is not one of null, [128, 128]"],
    ),
    (
        "version: 1\nrules: [{match: '*', method: fp8, activation_scheme: dynamci}]\n",
        [
            "p.yaml:2: rules[0].activation_scheme: 'dynamci' is not one of 'dynamic', 'static'; "
            "did you mean 'dynamic'?"
        ],
    ),
]


@pytest.mark.parametrize(("text", "messages"), REJECTED)
def test_schema_rule_rejects_with_line_and_remedy(
    refuse: Refuse, text: str, messages: list[str]
) -> None:
    assert refuse(text) == messages


def editor_validator() -> Draft202012Validator:
    """The schemas as an editor reads them: relative references from file to file."""
    files = [schema_path("preset.schema.json"), *schema_path("methods").glob("*.json")]
    registry: Registry[Any] = Registry().with_resources(
        (path.as_uri(), Resource.from_contents(json.loads(path.read_text()))) for path in files
    )
    return Draft202012Validator({"$ref": files[0].as_uri()}, registry=registry)


# A parent may have the rules: only the merged preset tells that there are none.
@pytest.mark.parametrize("text", [text for text, _ in REJECTED if "rules: []" not in text])
def test_editors_reject_what_loading_rejects(text: str) -> None:
    assert not editor_validator().is_valid(yaml.safe_load(text))


@pytest.mark.parametrize(
    "scheme",
    ["{method: gptq, bits: 8, desc_act: true}", "{method: int8}", "{method: fp16, source: a}"],
)
def test_editors_accept_flat_rules_and_schemes(scheme: str) -> None:
    text = (
        f"version: 1\nextends: [a, b]\nschemes:\n  x: {scheme}\n  y: ${{schemes.x}}\n"
        f"rules:\n  - {{match: ['*'], scheme: x, optional: true}}\n"
        f"  - {{match: '*', {scheme[1:-1]}}}\n"
    )
    assert list(editor_validator().iter_errors(yaml.safe_load(text))) == []


def test_schemas_are_valid_schemas() -> None:
    for path in [schema_path("preset.schema.json"), *schema_path("methods").glob("*.json")]:
        Draft202012Validator.check_schema(json.loads(path.read_text()))


def test_method_enum_is_the_registry() -> None:
    schema = json.loads(schema_path("preset.schema.json").read_text())
    assert schema["$defs"]["method"]["enum"] == list(method_names())


def test_branches_are_the_methods_names_and_arguments() -> None:
    schema = json.loads(schema_path("preset.schema.json").read_text())
    branches = schema["$defs"]["method_arguments"]["allOf"]
    for spec, branch in zip(METHODS.values(), branches, strict=True):
        assert branch["if"]["properties"]["method"]["enum"] == [spec.name, *spec.aliases]
        # a layer that runs as it is stored is never rounded again
        own = {"requantize": {"const": False}} if spec.name == "auto" else {}
        assert branch["then"]["properties"] == own | {
            key: dict(argument) for key, argument in spec.schema.items()
        }


def test_every_property_of_the_schema_is_described() -> None:
    schema = json.loads(schema_path("preset.schema.json").read_text())

    def check(part: Any) -> None:
        for key, value in part.get("properties", {}).items():
            target = value.get("$ref", "")
            named = schema["$defs"][target.rpartition("/")[2]] if target.startswith("#") else value
            assert named.get("description"), key

    for part in [schema, *schema["$defs"].values(), schema["$defs"]["rule"]["else"]]:
        check(part)


def test_other_packages_methods_join_the_schema() -> None:
    added = dataclasses.replace(METHODS["awq"], name="mine", aliases={"mine_int4": {}})
    schema = preset_schema([*METHODS.values(), added])
    assert schema["$defs"]["method"]["enum"][-2:] == ["mine", "mine_int4"]
    branch = schema["$defs"]["method_arguments"]["allOf"][-1]
    assert branch["if"]["properties"]["method"]["enum"] == ["mine", "mine_int4"]
