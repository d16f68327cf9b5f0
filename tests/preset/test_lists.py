from __future__ import annotations

import tracemalloc

import pytest

from mixedprec_plugin.preset.load import load_preset, load_resolved
from tests.preset.conftest import Refuse, Write

RULE = "rules: [{match: '*.experts.${lists.hot}.*', method: awq}]\n"


def text(hot: str, rule: str = RULE) -> str:
    return f"version: 1\nlists:\n  hot: {hot}\n{rule}"


@pytest.mark.parametrize(
    ("hot", "pattern"),
    [
        ("[3, 17, 42]", "*.experts.{3,17,42}.*"),
        ("[7]", "*.experts.7.*"),
        ("[3, '40..47']", "*.experts.{3,{40..47}}.*"),
        ("['40..47']", "*.experts.{40..47}.*"),
        ("[gate, up]", "*.experts.{gate,up}.*"),
    ],
)
def test_list_within_a_pattern_is_its_alternatives(write: Write, hot: str, pattern: str) -> None:
    assert load_preset(write("p.yaml", text(hot))).rules[0].patterns == (pattern,)


def test_list_that_stands_alone_is_the_rules_patterns(write: Write) -> None:
    patterns = ["*.layers.3.mlp.experts.{1,5}.*", "*.layers.4.mlp.experts.2.*"]
    rule = "rules: [{match: '${lists.hot}', method: awq}]\n"
    assert load_preset(write("p.yaml", text(str(patterns), rule))).rules[0].patterns == (*patterns,)


def test_list_of_a_file_that_extends_the_preset_wins(write: Write) -> None:
    write("base.yaml", text("[0, 1]"))
    own = write("own.yaml", "version: 1\nextends: base\nlists: {hot: [9, 11]}\n")
    assert load_preset(own).rules[0].patterns == ("*.experts.{9,11}.*",)


def test_list_may_come_from_a_file_that_holds_only_it(write: Write) -> None:
    write("hot.yaml", "version: 1\nlists: {hot: [9, 11], cold: [1]}\n")
    own = write("own.yaml", f"version: 1\nextends: hot\n{RULE}")
    assert load_preset(own).rules[0].patterns == ("*.experts.{9,11}.*",)


def test_list_can_be_overridden(write: Write) -> None:
    preset = load_preset(write("p.yaml", text("[0]")), ["lists.hot=[5,6]"])
    assert preset.rules[0].patterns == ("*.experts.{5,6}.*",)


def test_other_interpolations_beside_a_list_are_kept(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIXEDPREC_TEST_BLOCK", "mlp")
    rule = "rules: [{match: '*.${oc.env:MIXEDPREC_TEST_BLOCK}.experts.${lists.hot}', method: awq}]"
    assert load_preset(write("p.yaml", text("[1, 2]", rule))).rules[0].patterns == (
        "*.mlp.experts.{1,2}",
    )


def test_escaped_reference_is_plain_text(write: Write) -> None:
    described = text("[1]") + r"description: 'write \${lists.hot}'" + "\n"
    assert load_preset(write("p.yaml", described)).description == "write ${lists.hot}"


def test_resolved_preset_loads_again(write: Write) -> None:
    preset = load_preset(write("p.yaml", text("[3, '40..47']")))
    again = load_resolved(preset.resolved, "again")
    assert [rule.patterns for rule in again.rules] == [rule.patterns for rule in preset.rules]


@pytest.mark.slow
def test_list_bomb_is_refused_before_it_grows(refuse: Refuse) -> None:
    rules = "".join(f"  - {{match: '{'${lists.hot}' * 200}', method: awq}}\n" for _ in range(4))
    tracemalloc.start()
    try:
        refused = refuse(text(f"['{'x' * 50_000}', y]", f"rules:\n{rules}"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert refused == [
        "p.yaml:1: interpolations make the preset longer than 2097152 characters; refer to less"
    ]
    # all of it would be 40 MB
    assert peak < 16 << 20


@pytest.mark.parametrize(
    ("hot", "match"),
    [
        ("['oc.env:MIXEDPREC_TEST_SECRET', x]", "$${lists.hot}"),
        ("['x$']", "${lists.hot}{oc.env:MIXEDPREC_TEST_SECRET}"),
        ("['x\\']", r"${lists.hot}\${oc.env:MIXEDPREC_TEST_SECRET}"),
    ],
)
def test_lists_make_no_interpolations(
    refuse: Refuse, monkeypatch: pytest.MonkeyPatch, hot: str, match: str
) -> None:
    monkeypatch.setenv("MIXEDPREC_TEST_SECRET", "hunter2")
    (message,) = refuse(text(hot, f"rules: [{{match: '{match}', method: awq}}]\n"))
    assert "which no layer name has" in message
    assert "hunter2" not in message


@pytest.mark.parametrize(
    ("hot", "message"),
    [
        ("{a: 1}", "p.yaml:3: lists.hot: {\"a\": 1} is a mapping (expected a list)"),
        ("3", "p.yaml:3: lists.hot: 3 is a number (expected a list)"),
        ("[]", "p.yaml:3: lists.hot: [] is empty (expected at least one)"),
        ("[1.5]", "p.yaml:3: lists.hot[0]: 1.5 is a number (expected a whole number or text)"),
        ("[true]", "p.yaml:3: lists.hot[0]: true is a boolean (expected a whole number or text)"),
    ],
)  # fmt: skip
def test_what_is_no_list_is_refused(refuse: Refuse, hot: str, message: str) -> None:
    rule = "rules: [{match: '*', method: awq}]\n"
    assert refuse(text(hot, rule)) == [message]


def test_unknown_list_is_refused_with_the_nearest(refuse: Refuse) -> None:
    (message,) = refuse(text("[1]").replace("${lists.hot}", "${lists.hott}"))
    assert "${lists.hott} points at nothing (there is no 'lists.hott'); did you mean 'hot'?" in (
        message
    )


def test_numbers_alone_are_no_patterns(refuse: Refuse) -> None:
    rule = "rules: [{match: '${lists.hot}', method: awq}]\n"
    (message,) = refuse(text("[1]", rule))
    assert "1 is a number (expected text)" in message
