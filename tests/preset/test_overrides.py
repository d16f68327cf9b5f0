from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from mixedprec_plugin.preset.load import load_preset
from tests.preset.conftest import Refuse, Write

TEXT = (
    "version: 1\n"
    "description: text\n"
    "schemes:\n"
    "  a: {method: gptq, group_size: 128}\n"
    "  b: ${schemes.a}\n"
    "rules:\n"
    "  - {match: '*', scheme: a}\n"
    "  - {match: ['*.q', '*.k'], method: awq}\n"
)


@pytest.mark.parametrize(
    "overrides",
    [
        ["schemes.a.group_size=64"],
        ["schemes.a.group_size=64", "schemes.a.group_size=32"],
        ["schemes.a.bits=8", "schemes[a].desc_act=null"],
        ["rules.0.scheme=b"],
        ["rules[1].method=gptq", "rules.1.bits=8"],
        ["rules.1.match.0=*.v"],
        ["rules.1.match=[x,y]"],
        ["schemes.a={rounding: calibrated}"],
        ["schemes.c={method: fp8, weight_block_size: [128, 128]}", "rules.0.scheme=c"],
        ["sources.s.path=/x", "schemes.a.source=s"],
        ["trust_sources=true", "on_fused_conflict=highest"],
        ["description='a = b'"],
        ["description=a=b"],
        ["schemes.b=${schemes.a}"],
        ["schemes.a.group_size=${oc.env:UNSET_SIZE,null}", "schemes.a.group_size=64"],
    ],
)
def test_overrides_set_what_omegaconf_dotlists_set(write: Write, overrides: list[str]) -> None:
    path = write("p.yaml", TEXT)
    config = OmegaConf.create(TEXT)
    # YAML takes '*.v' for an alias; only the preset's overrides take it for a pattern.
    config.merge_with_dotlist([text.replace("=*.v", "='*.v'") for text in overrides])
    expected = OmegaConf.to_container(config, resolve=True)
    assert load_preset(path, overrides).resolved == expected


def test_pattern_needs_no_quotes(write: Write) -> None:
    preset = load_preset(write("p.yaml", TEXT), ["rules.0.match=*.layers.{30,31}.*"])
    assert preset.rules[0].patterns == ("*.layers.{30,31}.*",)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("", "is not an override (expected KEY=VALUE, such as schemes.experts.group_size=64)"),
        ("a", "is not an override (expected KEY=VALUE, such as schemes.experts.group_size=64)"),
        ("=1", "is not an override (expected KEY=VALUE, such as schemes.experts.group_size=64)"),
        (
            "a..b=1",
            "is not an override (expected KEY=VALUE, such as schemes.experts.group_size=64)",
        ),
        ("rules.2.method=awq", "rules has no item '2' (expected a number below 2)"),
        ("rules.x.method=awq", "rules has no item 'x' (expected a number below 2)"),
        ("version.x=1", "version is 1 and has no 'x'"),
        (
            "schemes.b.group_size=64",
            "schemes.b is the interpolation '${schemes.a}' and has no 'group_size' of its own; "
            "override what it points at, or set it as a whole",
        ),
        (
            "extends=awq",
            "the key 'extends' cannot be overridden; parents are read first; change the file",
        ),
        ("trust_sources=on", "on is true in YAML 1.1 and text in YAML 1.2; write true or '\"on\"'"),
        ("rules.0=[", "is not YAML: expected the node content, but found '<stream end>'"),
        ("version=2", "2 is not a version of the preset language (expected 1)"),
        (
            "schemes.a.group_size=100",
            "100 is not one of 128, 64, 32, -1",
        ),
        (
            "schemes.a.gruop_size=64",
            "unknown key 'gruop_size' (expected method, source, requantize, bits, group_size, sym, "
            "desc_act, rounding); did you mean 'group_size'?",
        ),
        ("rules.0.scheme=x", "unknown scheme 'x' (expected a, b)"),
        (
            "rules.0.method=awq",
            "'method' does not go with 'scheme'; name a scheme, or a method with its arguments, "
            "not both",
        ),
        (
            "rules.1.method=awk",
            "unknown method 'awk' (expected bf16, fp8, fp8_channel, blockwise_int8, "
            "int8_channel, awq, gptq, humming, nvfp4, mxfp4, "
            "auto); did you mean 'awq'?",
        ),
        ("rules.0.match=a{", "'a{' opens a '{' that nothing closes"),
        ("rules.1.method=[x]", '["x"] is a list (expected text)'),
        ("rules.1.method={a: b}", '{"a": "b"} is a mapping (expected text)'),
        ("rules.1.source=[x]", '["x"] is a list (expected text)'),
        (
            f"rules.{'9' * 5000}.method=fp8",
            f"rules has no item '{'9' * 5000}' (expected a number below 2)",
        ),
        (
            ".".join(["a"] * 2000) + "=1",
            "is not an override (expected KEY=VALUE, such as schemes.experts.group_size=64)",
        ),
        ("description=" + "[" * 2000, "nested more than 32 deep; a preset needs four levels"),
        (
            "rules.0.match=*.${oc.decode:x}",
            "the resolver 'oc.decode' in ${oc.decode:x} is not "
            "allowed in presets; only ${oc.env:NAME} and references such as ${schemes.NAME} are",
        ),
        ("lists=[x]", '["x"] is a list (expected a mapping)'),
        ("rules={a: b}", '{"a": "b"} is a mapping (expected a list)'),
        ("schemes.c.bits=4", "'method' is missing; add 'method: …'"),
        (
            "schemes.c={method: awq, method: gptq}",
            "method: 'method' stands here a second time; keep one of them",
        ),
        ("schemes.c=???", "has no value yet ('???'); give it with --mixedprec-set schemes.c=VALUE"),
    ],
)
def test_problem_names_the_override(refuse: Refuse, override: str, message: str) -> None:
    found = [text for text in refuse(TEXT, override) if "schemes.b" not in text.partition(";")[0]
             or "schemes.b.group_size=64" in text]  # fmt: skip
    assert found == [f"--mixedprec-set {override}: {message}"]


def test_part_of_an_overriding_mapping_is_named(refuse: Refuse) -> None:
    assert refuse(TEXT, "schemes.c={method: awq, bits: 3}") == [
        "--mixedprec-set schemes.c={method: awq, bits: 3}: bits: 3 is not 4"
    ]


def test_override_mends_a_value(write: Write) -> None:
    path = write("p.yaml", TEXT.replace("group_size: 128", "group_size: '???'"))
    preset = load_preset(path, ["schemes.a.group_size=32"])
    assert preset.rules[0].scheme.arguments["group_size"] == 32
