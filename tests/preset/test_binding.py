from __future__ import annotations

import pytest

from mixedprec_plugin.preset.load import load_preset
from tests.preset.conftest import Refuse, Write

HEAD = "version: 1\nsources: {int4: {path: x}}\nschemes:\n  mlp: {method: gptq}\n"


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            "{match: '*', scheme: mpl}",
            "p.yaml:6: rules[0].scheme: unknown scheme 'mpl' (expected mlp); did you mean 'mlp'?",
        ),
        (
            "{match: '*', method: awq, source: int5}",
            "p.yaml:6: rules[0].source: unknown source 'int5' (expected model, int4); "
            "did you mean 'int4'?",
        ),
        (
            "{match: '*', method: gptq_int8, bits: 4}",
            "p.yaml:6: rules[0].bits: 4 contradicts the name 'gptq_int8' (expected 8); "
            "leave bits out, or write 'method: gptq'",
        ),
        (
            "{match: ['*', 'a{b'], method: awq}",
            "p.yaml:6: rules[0].match[1]: 'a{b' opens a '{' that nothing closes",
        ),
    ],
)
def test_reference_or_argument_that_does_not_fit_is_refused(
    refuse: Refuse, rule: str, message: str
) -> None:
    assert refuse(f"{HEAD}rules:\n  - {rule}\n") == [message]


def test_scheme_without_any_schemes_says_so(refuse: Refuse) -> None:
    assert refuse("version: 1\nrules: [{match: '*', scheme: a}]\n") == [
        "p.yaml:2: rules[0].scheme: unknown scheme 'a' (the preset has no 'schemes')"
    ]


def test_all_problems_come_at_once_by_line(refuse: Refuse) -> None:
    messages = refuse(
        "version: 1\n"
        "description: on\n"
        "schemes:\n"
        "  a: {method: gtpq}\n"
        "rules:\n"
        "  - {match: 'a}', method: awq}\n"
        "  - {match: '*', scheme: b}\n"
        "  - {match: '*', scheme: a}\n"
        "  - {match: '*', method: gptq_int8, bits: 4}\n"
        "  - {match: '*', method: '${schemes.c.method}'}\n"
        "trust_source: true\n",
        "schemes.d.method=awk",
    )
    assert [message.partition(" ")[0] for message in messages[:-1]] == [
        f"p.yaml:{line}:" for line in (2, 4, 6, 7, 9, 10, 11)
    ]
    assert messages[-1].startswith("--mixedprec-set schemes.d.method=awk: unknown method 'awk'")


def test_rule_carries_bound_scheme_source_and_line(write: Write) -> None:
    text = (
        f"{HEAD}rules:\n  - {{match: '*', scheme: mlp}}\n  - match: ['a', 'b']\n    method: int8\n"
    )
    text += "    source: int4\n    optional: true\n"
    preset = load_preset(write("p.yaml", text))
    first, second = preset.rules
    assert first.scheme.label == "mlp"
    assert first.scheme.method == "gptq"
    assert first.scheme.arguments["group_size"] == 128
    assert first.scheme.source == "model"
    assert str(first.location) == "p.yaml:6: rules[0]"
    assert second.patterns == ("a", "b")
    assert second.optional
    assert (second.scheme.label, second.scheme.method) == ("int8", "blockwise_int8")
    assert second.scheme.source == "int4"
    assert str(second.location) == "p.yaml:7: rules[1]"
    assert preset.sources["int4"].path == "x"


def test_whole_numbers_written_as_decimals_are_whole(write: Write) -> None:
    preset = load_preset(
        write("p.yaml", "version: 1\nrules: [{match: '*', method: gptq, bits: 8.0}]")
    )
    assert repr(preset.rules[0].scheme.arguments["bits"]) == "8"


def test_unused_scheme_and_source_are_warnings(write: Write) -> None:
    preset = load_preset(write("p.yaml", f"{HEAD}rules:\n  - {{match: '*', method: awq}}\n"))
    assert [str(problem) for problem in preset.warnings] == [
        "p.yaml:2: sources.int4: no rule takes layers from this source; give it a rule",
        "p.yaml:4: schemes.mlp: no rule uses this scheme; give it a rule, or take it away",
    ]


def test_scheme_used_by_an_interpolation_is_used(write: Write) -> None:
    text = (
        "version: 1\nschemes:\n  a: {method: awq}\n  b: ${schemes.a}\n"
        "rules: [{match: '*', scheme: b}]\n"
    )
    assert load_preset(write("p.yaml", text)).warnings == ()
