from __future__ import annotations

import time
from typing import Any

import omegaconf
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from mixedprec_plugin.preset.interpolation import escape
from mixedprec_plugin.preset.load import load_preset
from tests.preset.conftest import Refuse, Write

RULES = "version: 1\nrules: [{match: '*', method: awq}]\n"
PAIRS = "expected '${' and '}' in pairs, at most one pair within another"
SYNTAX = "write ${schemes.NAME} or ${oc.env:NAME}; for a plain '${' write '\\${'"
ALLOWED = "only ${oc.env:NAME} and references such as ${schemes.NAME} are"


def schemes(*lines: str) -> str:
    return RULES + "schemes:\n" + "".join(f"  {line}\n" for line in lines)


def test_scheme_stands_for_another(write: Write) -> None:
    text = schemes("a: {method: gptq, group_size: 64}", "b: ${schemes.a}", "c: ${.b}")
    assert load_preset(write("p.yaml", text)).resolved["schemes"]["c"] == {
        "method": "gptq",
        "group_size": 64,
    }


def test_scalar_keeps_its_type(write: Write) -> None:
    text = schemes("a: {method: gptq, group_size: 64}", "b: ${schemes.a}").replace(
        "{match: '*', method: awq}",
        "{match: '*', method: awq, group_size: '${schemes.b.group_size}'}",
    )
    preset = load_preset(write("p.yaml", text))
    assert preset.rules[0].scheme.arguments["group_size"] == 64


def test_environment_variable_and_default(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXEDPREC_TEST_SIZE", "big")
    monkeypatch.delenv("MIXEDPREC_TEST_UNSET", raising=False)
    text = "${oc.env:MIXEDPREC_TEST_SIZE}-${oc.env:MIXEDPREC_TEST_UNSET,small}"
    preset = load_preset(write("p.yaml", f"{RULES}description: {text}\n"))
    assert preset.description == "big-small"


def test_value_of_a_variable_is_not_interpolated_again(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIXEDPREC_TEST_TEXT", "${oc.create:1}")
    path = write("p.yaml", f"{RULES}description: ${{oc.env:MIXEDPREC_TEST_TEXT}}\n")
    assert load_preset(path).description == "${oc.create:1}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("${oc.env:MIXEDPREC_TEST_UNSET}", "the environment variable MIXEDPREC_TEST_UNSET is not "
         "set; set it, or give a default: ${oc.env:MIXEDPREC_TEST_UNSET,DEFAULT}"),
        ("${oc.env:A,${oc.env:MIXEDPREC_TEST_UNSET}}", "the environment variable "
         "MIXEDPREC_TEST_UNSET is not set; set it, or give a default: "
         "${oc.env:MIXEDPREC_TEST_UNSET,DEFAULT}"),
        ("${oc.env:}", "${oc.env:} does not name one environment variable; "
         "write ${oc.env:NAME} or ${oc.env:NAME,DEFAULT}"),
        ("${oc.env:${version}}", "${oc.env:${version}} does not name one environment variable; "
         "write ${oc.env:NAME} or ${oc.env:NAME,DEFAULT}"),
        ("${oc.decode:1}", f"the resolver 'oc.decode' in ${{oc.decode:1}} is not allowed in "
         f"presets; {ALLOWED}"),
        ("${evil:1}", f"the resolver 'evil' in ${{evil:1}} is not allowed in presets; {ALLOWED}"),
        ("x ${evil:1} y", "the resolver 'evil' in ${evil:1} is not allowed in presets; "
         f"{ALLOWED}"),
        ("${oc.env:A,${evil:1}}", f"the resolver 'evil' in ${{evil:1}} is not allowed in presets; "
         f"{ALLOWED}"),
        ("${schemes.${evil:1}}", f"the resolver 'evil' in ${{evil:1}} is not allowed in presets; "
         f"{ALLOWED}"),
        ("${oc.env:${evil:1}}", f"the resolver 'evil' in ${{evil:1}} is not allowed in presets; "
         f"{ALLOWED}"),
        ("${${evil:1}:A}", f"the resolver 'evil' in ${{evil:1}} is not allowed in presets; "
         f"{ALLOWED}"),
        ("${${version}:A}", "the resolver '${version}' in ${${version}:A} is not allowed in "
         f"presets; {ALLOWED}"),
        ("${schemes.${version}}", "${schemes.${version}} has an interpolation within its key; "
         "write the key out; a rule's 'scheme' may be an interpolation itself"),
        ("${nothing.here}", "${nothing.here} points at nothing (there is no 'nothing')"),
        ("${ruels}", "${ruels} points at nothing (there is no 'ruels'); did you mean 'rules'?"),
        ("${rules.0.metod}", "${rules.0.metod} points at nothing (there is no 'rules.0.metod'); "
         "did you mean 'method'?"),
        ("${rules.7}", "${rules.7} points at nothing (there is no 'rules.7')"),
        ("${....x}", "${....x} points at nothing (no such level)"),
        ("all ${rules}", "${rules} is not text and stands within text; let it stand alone"),
        ("${", f"'${{' is not an interpolation ({PAIRS}); {SYNTAX}"),
        ("${a", f"'${{a' is not an interpolation ({PAIRS}); {SYNTAX}"),
        ("${a b}", f"${{a b}} is not an interpolation (expected keys and dots); {SYNTAX}"),
        ("${oc.env:A,~}", "'${oc.env:A,~}' is not an interpolation: token recognition error at: "
         f"'~'; {SYNTAX}"),
        ("${oc.env:A,b,c}", "${oc.env:A,b,c} does not name one environment variable; "
         "write ${oc.env:NAME} or ${oc.env:NAME,DEFAULT}"),
        ("${rules." + "9" * 5000 + "}", "${rules." + "9" * 5000 + "} points at nothing "
         "(there is no 'rules." + "9" * 5000 + "')"),
        ("${description}", "interpolations go in a circle: description -> description; "
         "write one of them out"),
        ("${version}", "1 is a number (expected text)"),
    ],
)  # fmt: skip
def test_interpolation_that_cannot_be_resolved_is_refused(
    refuse: Refuse, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    monkeypatch.delenv("MIXEDPREC_TEST_UNSET", raising=False)
    assert refuse(f"{RULES}description: {text}\n") == [f"p.yaml:3: description: {message}"]


def test_registered_resolver_is_refused_and_never_called(refuse: Refuse) -> None:
    calls: list[Any] = []
    # Each version warns of the other's name.
    is_old = omegaconf.__version__.startswith("2.3.")
    register = OmegaConf.register_new_resolver if is_old else OmegaConf.register_resolver
    register("evil", calls.append)
    try:
        for text in ("${evil:1}", "${oc.env:A,${evil:1}}", "${schemes.${evil:1}}"):
            assert "the resolver 'evil'" in refuse(f"{RULES}description: {text}\n")[0]
    finally:
        OmegaConf.clear_resolver("evil")
    assert calls == []


def test_circle_names_every_link(refuse: Refuse) -> None:
    text = schemes(
        "a: {method: '${schemes.b.method}'}",
        "b: {method: '${schemes.c.method}'}",
        "c: {method: '${schemes.a.method}'}",
    )
    assert refuse(text) == [
        "p.yaml:4: schemes.a.method: interpolations go in a circle: schemes.a.method -> "
        "schemes.b.method -> schemes.c.method -> schemes.a.method; write one of them out"
    ]


def test_scheme_that_holds_itself_is_a_circle(refuse: Refuse) -> None:
    assert refuse(schemes("a: ${schemes}")) == [
        "p.yaml:4: schemes.a: interpolations go in a circle: schemes.a -> schemes.a; "
        "write one of them out"
    ]


def test_what_follows_from_an_unresolved_value_is_not_reported(refuse: Refuse) -> None:
    text = schemes("a: {method: '${schemes.x.method}', bits: 4}", "b: ${schemes.a}")
    assert refuse(text) == [
        "p.yaml:4: schemes.a.method: ${schemes.x.method} points at nothing "
        "(there is no 'schemes.x')"
    ]


def test_doubling_text_is_refused_before_it_grows(refuse: Refuse) -> None:
    lines = [f"s{i}: ${{schemes.s{i + 1}}}${{schemes.s{i + 1}}}" for i in range(30)]
    start = time.monotonic()
    assert refuse(schemes(*lines, "s30: laugh")) == [
        "p.yaml:1: interpolations make the preset longer than 2097152 characters; refer to less"
    ]
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("order", [1, -1])
def test_long_chains_are_refused_in_any_order(refuse: Refuse, order: int) -> None:
    lines = ["s0: {method: awq}"] + [f"s{i}: ${{schemes.s{i - 1}}}" for i in range(1, 500)]
    assert (
        "more than 32 interpolations lie one behind another; refer to the value itself"
        in (refuse(schemes(*lines[::order]))[0])
    )


def test_text_from_the_environment_is_not_taken_for_a_number(
    refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIXEDPREC_TEST_SIZE", "64")
    text = schemes("a: {method: gptq, group_size: '${oc.env:MIXEDPREC_TEST_SIZE}'}")
    assert refuse(text) == [
        "p.yaml:4: schemes.a.group_size: '${oc.env:MIXEDPREC_TEST_SIZE}' is text and not one of "
        "128, 64, 32, -1; environment variables are text; override the key on the command line"
    ]


@pytest.mark.parametrize(
    "text",
    ["${a:" * 400 + "}" * 400, "${oc.env:A," * 300 + "x" + "}" * 300, "${" * 300 + "x" + "}" * 300,
     "${oc.env:A,[" + "[" * 400 + "]" * 400 + "]}", "${version}" * 2000,
     "${version}" + "x" * 10_000,
     "$" * 5000 + "{version}" + "${" * 2000],
)  # fmt: skip
def test_text_that_nests_or_is_too_long_is_refused_with_its_line(refuse: Refuse, text: str) -> None:
    (message,) = refuse(f"{RULES}description: '{text}'\n")
    assert message.startswith("p.yaml:3: description: ")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("rules: [{match: '*', method: '${oc.env:MIXEDPREC_TEST_SECRET}'}]",
         "rules[0].method: unknown method '${oc.env:MIXEDPREC_TEST_SECRET}' (expected bf16, "),
        ("rules: [{match: '*', scheme: '${oc.env:MIXEDPREC_TEST_SECRET}'}]",
         "rules[0].scheme: unknown scheme '${oc.env:MIXEDPREC_TEST_SECRET}' (the preset has no "),
        ("rules: [{match: '*', method: awq, source: 'a${oc.env:MIXEDPREC_TEST_SECRET}'}]",
         "rules[0].source: unknown source 'a${oc.env:MIXEDPREC_TEST_SECRET}' (expected model)"),
        ("rules: [{match: '*{${oc.env:MIXEDPREC_TEST_SECRET}', method: awq}]",
         "rules[0].match: '*{${oc.env:MIXEDPREC_TEST_SECRET}' stands for no pattern"),
        ("on_fused_conflict: ${oc.env:MIXEDPREC_TEST_UNSET,${oc.env:MIXEDPREC_TEST_SECRET}}",
         "on_fused_conflict: '${oc.env:MIXEDPREC_TEST_SECRET}' is not one of 'error', 'highest'"),
        ("draft: ${oc.env:MIXEDPREC_TEST_SECRET}",
         "draft: '${oc.env:MIXEDPREC_TEST_SECRET}' is text (expected a mapping)"),
        ("trust_sources: ${description}", "trust_sources: 'by ${oc.env:MIXEDPREC_TEST_SECRET}' is "
         "text (expected true or false)"),
    ],
)  # fmt: skip
def test_values_of_variables_are_in_no_message(
    refuse: Refuse, monkeypatch: pytest.MonkeyPatch, line: str, message: str
) -> None:
    monkeypatch.setenv("MIXEDPREC_TEST_SECRET", "hunter2")
    monkeypatch.delenv("MIXEDPREC_TEST_UNSET", raising=False)
    described = "version: 1\ndescription: by ${oc.env:MIXEDPREC_TEST_SECRET}\n"
    (found,) = refuse(f"{described}{line}\n")
    assert found.startswith(f"p.yaml:3: {message}")
    assert "hunter2" not in found


@given(st.text("\\${}ab", max_size=12))
@example("\\\\${a")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_escaped_text_resolves_to_itself(text: str) -> None:
    config: Any = OmegaConf.create({"key": escape(text)})
    assert config.key == text
