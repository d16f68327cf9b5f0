from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixedprec_plugin.errors import PresetError
from mixedprec_plugin.plan.matching import match_rules
from mixedprec_plugin.preset.load import load_preset, load_resolved
from mixedprec_plugin.preset.model import Location, Preset
from mixedprec_plugin.resources import preset_dir, preset_names
from tests.preset.conftest import Refuse, Write

LLAMA = [
    f"model.layers.{layer}.{name}"
    for layer in range(32)
    for name in (
        *(f"self_attn.{part}_proj" for part in "qkvo"),
        *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
    )
]


def without_places(preset: Preset) -> Any:
    nowhere = Location("", 0)
    return (
        [dataclasses.replace(rule, location=nowhere) for rule in preset.rules],
        [dataclasses.replace(source, location=nowhere) for source in preset.sources.values()],
        preset.description,
        preset.on_fused_conflict,
        preset.trust_sources,
        preset.resolved,
    )


@pytest.mark.parametrize("name", preset_names())
def test_shipped_preset_resolves(name: str) -> None:
    preset = load_preset(name)
    assert preset.rules
    assert preset.warnings == ()
    assert preset.description.endswith(".")


@pytest.mark.parametrize("name", preset_names())
def test_shipped_preset_has_the_whole_header(name: str) -> None:
    text = (preset_dir() / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=../../schemas/preset.schema.json\n")
    header = text.partition("version: 1")[0]
    for part in ("# Purpose   ", "# Command   sglang serve ", "# Override  ", "# Limits    "):
        assert part in header
    assert f"--mixedprec-config {name}" in header


def test_shipped_presets_are_the_promised_ones() -> None:
    assert set(preset_names()) >= {
        "fp8-block",
        "fp8-channel",
        "int8-block",
        "awq",
        "gptq",
        "attention-fp8-mlp-int4",
        "first-last-bf16-int4",
        "down-proj-finer",
        "moe-experts-int4",
        "moe-experts-awq",
        "moe-experts-mxfp4",
        "moe-finer-first-shared",
        "moe-hot-experts",
        "qwen3-30b-a3b",
        "mixtral-8x7b",
        "deepseek-v3",
        "glm-4.5-air",
    }


def decide(preset: Preset, name: str) -> str:
    """The method of the last rule that matches a layer."""
    scheme = match_rules(preset.rules, LLAMA).deciding[name].scheme
    return f"{scheme.method}{scheme.arguments.get('bits', '')}"


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("fp8-block", [], {"fp8"}),
        ("fp8-channel", [], {"fp8_channel"}),
        ("int8-channel", [], {"int8_channel"}),
        ("fp8-channel", ["schemes.all.method=fp8"], {"fp8"}),
        ("int8-block", [], {"blockwise_int8"}),
        ("awq", [], {"awq4"}),
        ("gptq", [], {"gptq4"}),
        ("humming", [], {"humming6"}),
        ("nvfp4", [], {"nvfp4"}),
    ],
)
def test_whole_presets_cover_every_layer(
    name: str, overrides: list[str], expected: set[str]
) -> None:
    preset = load_preset(name, overrides)
    assert {decide(preset, layer) for layer in LLAMA} == expected


def test_mixed_presets_decide_as_their_names_say() -> None:
    preset = load_preset("attention-fp8-mlp-int4")
    for layer in LLAMA:
        assert decide(preset, layer) == ("fp8" if "self_attn" in layer else "awq4")
    preset = load_preset("down-proj-finer")
    for layer in LLAMA:
        assert decide(preset, layer) == ("gptq8" if "down_proj" in layer else "gptq4")
    preset = load_preset("first-last-bf16-int4")
    for layer in LLAMA:
        at_an_end = layer.split(".")[2] in ("0", "1", "30", "31")
        assert decide(preset, layer) == ("bf16" if at_an_end else "awq4")


def test_packaged_preset_is_found_from_any_folder(write: Write) -> None:
    assert Path(load_preset("awq").path) == preset_dir() / "awq.yaml"


def test_packaged_preset_may_have_a_dot_in_its_name() -> None:
    assert Path(load_preset("glm-4.5-air").path) == preset_dir() / "glm-4.5-air.yaml"


def test_file_in_the_working_directory_goes_before_a_packaged_preset(write: Write) -> None:
    write("awq", "version: 1\nrules: [{match: '*', method: fp8}]\n")
    assert load_preset("awq").rules[0].scheme.method == "fp8"


words = st.text("ab${}\\.\"'# é:-", max_size=8)
arguments = st.one_of(
    st.fixed_dictionaries({"method": st.sampled_from(["gptq", "gptq_int8"])},
                          optional={"group_size": st.sampled_from([32, 64, 128, -1]),
                                    "desc_act": st.sampled_from([None, False])}),
    st.fixed_dictionaries({"method": st.just("fp8")},
                          optional={"weight_block_size": st.sampled_from([None, [128, 128]])}),
    st.fixed_dictionaries({"method": st.sampled_from(["bf16", "none", "int8", "awq"])},
                          optional={"source": st.sampled_from(["model", "s"])}),
)  # fmt: skip
globs = st.sampled_from(["*", "*.q_proj", "*.{q,k}_proj", "*.layers.{0..3}.*", "lm_head"])
matches = globs | st.lists(globs, min_size=1, max_size=3)


@st.composite
def presets(draw: st.DrawFn) -> dict[str, Any]:
    schemes = draw(st.dictionaries(st.sampled_from(["a", "b", "c"]), arguments, min_size=1))
    named = st.fixed_dictionaries(
        {"match": matches, "scheme": st.sampled_from(sorted(schemes))},
        optional={"optional": st.booleans()},
    )
    flat = st.builds(
        lambda match, method: {"match": match, **method}, match=matches, method=arguments
    )
    return {
        "version": 1,
        "description": draw(words.filter(lambda text: "${" not in text)),
        "sources": {"s": {"path": draw(words.filter(lambda t: t and "${" not in t))}},
        "schemes": {**schemes, "d": "${schemes." + sorted(schemes)[0] + "}"},
        "rules": draw(st.lists(named | flat, min_size=1, max_size=4)),
        "on_fused_conflict": draw(st.sampled_from(["error", "highest"])),
        "trust_sources": draw(st.booleans()),
    }


@given(presets(), words)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_resolved_preset_loads_as_the_same_preset(
    write: Write, content: dict[str, Any], variable: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIXEDPREC_TEST_TEXT", variable)
        text = yaml.safe_dump(json.loads(json.dumps(content)), allow_unicode=True)
        first = load_preset(
            write("p.yaml", text), ["description=${oc.env:MIXEDPREC_TEST_TEXT}"] * ("$" in variable)
        )
    # neither files nor messages hold the values of environment variables
    shown = "${oc.env:MIXEDPREC_TEST_TEXT}" if "$" in variable else content["description"]
    first = dataclasses.replace(first, description=shown)
    as_yaml = load_preset(write("yaml.yaml", yaml.safe_dump(first.resolved, allow_unicode=True)))
    as_json = load_preset(write("json.yaml", json.dumps(first.resolved, indent=1)))
    assert without_places(as_yaml) == without_places(first)
    assert without_places(as_json) == without_places(first)


CARRIED = "config.json: quantization_config.preset"


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else 1


@pytest.mark.parametrize("depth", [32, 900])
def test_preset_of_a_checkpoint_may_not_nest_deeply(depth: int) -> None:
    with pytest.raises(PresetError) as caught:
        load_resolved({"version": 1, "rules": [], "x": nested(depth)}, CARRIED)
    what = "nested more than 32 deep; a preset needs four levels"
    assert str(caught.value) == f"{CARRIED}: {what}"


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("${oc.env:MIXEDPREC_TEST_SECRET}", "${oc.env:MIXEDPREC_TEST_SECRET} reads the environment,"
         " which a checkpoint's own preset may not; name a preset of your own"),
        ("${oc.env:X,${oc.env:MIXEDPREC_TEST_SECRET}}", "${oc.env:X,${oc.env:MIXEDPREC_TEST_SECRET}"
         "} reads the environment, which a checkpoint's own preset may not; name a preset of your "
         "own"),
        ("${oc.decode:1}", "the resolver 'oc.decode' in ${oc.decode:1} is not allowed in presets; "
         "only ${oc.env:NAME} and references such as ${schemes.NAME} are"),
    ],
)  # fmt: skip
def test_preset_of_a_checkpoint_may_not_read_the_environment(
    monkeypatch: pytest.MonkeyPatch, description: str, message: str
) -> None:
    monkeypatch.setenv("MIXEDPREC_TEST_SECRET", "hunter2")
    rules = [{"match": "*", "method": "awq"}]
    carried = {"version": 1, "description": description, "rules": rules}
    with pytest.raises(PresetError) as caught:
        load_resolved(carried, CARRIED)
    assert str(caught.value) == f"{CARRIED}: description: {message}"


def test_override_beside_it_gives_a_checkpoints_preset_no_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MIXEDPREC_TEST_SECRET", "awq")
    schemes = {"a": {"method": "awq"}, "b": {"method": "${oc.env:MIXEDPREC_TEST_SECRET}"}}
    rules = [{"match": "*", "scheme": "a"}]
    with pytest.raises(PresetError, match=r"schemes\.b\.method: .* reads the environment"):
        load_resolved(
            {"version": 1, "schemes": schemes, "rules": rules}, CARRIED, ["schemes.a.group_size=64"]
        )


@pytest.mark.parametrize(
    ("key", "value"), [("extends", "awq"), ("sources", {"a": {"path": "/home"}})]
)
def test_preset_of_a_checkpoint_names_no_files(key: str, value: Any) -> None:
    rules = [
        {"match": "*", "method": "awq", "source": "a"}
        if key == "sources"
        else {"match": "*", "method": "awq"}
    ]
    with pytest.raises(PresetError) as caught:
        load_resolved({"version": 1, key: value, "rules": rules}, CARRIED)
    what = "reads other files, which a checkpoint's own preset may not; name a preset of your own"
    assert str(caught.value) == f"{CARRIED}: {key}: {what}"


def test_override_gives_a_checkpoints_preset_a_source() -> None:
    carried = {"version": 1, "rules": [{"match": "*", "method": "awq"}]}
    overrides = ["sources.a.path=/home", "rules.0.source=a"]
    assert load_resolved(carried, CARRIED, overrides).sources["a"].path == "/home"


def test_override_of_a_checkpoints_preset_may_read_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MIXEDPREC_TEST_TEXT", "by me")
    carried = {"version": 1, "rules": [{"match": "*", "method": "awq"}]}
    override = "description=${oc.env:MIXEDPREC_TEST_TEXT}"
    assert load_resolved(carried, CARRIED, [override]).description == "by me"


def test_resolved_preset_names_variables_and_holds_no_value(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIXEDPREC_TEST_SECRET", "hunter2")
    text = (
        "version: 1\ndescription: by ${oc.env:MIXEDPREC_TEST_SECRET}\n"
        "sources: {a: {path: 'x/${oc.env:MIXEDPREC_TEST_SECRET}'}}\n"
        "lists: {hot: [1, '${oc.env:MIXEDPREC_TEST_SECRET}']}\n"
        "rules:\n  - {match: '*', method: awq, source: a}\n"
        "  - {match: 'a.${oc.env:MIXEDPREC_TEST_SECRET}', method: fp8}\n"
    )
    preset = load_preset(write("p.yaml", text))
    assert preset.description == "by hunter2"
    assert (preset.sources["a"].path, preset.rules[1].patterns) == ("x/hunter2", ("a.hunter2",))
    assert str(preset.rules[1]) == "rule 1, 'a.${oc.env:MIXEDPREC_TEST_SECRET}'"
    assert preset.sources["a"].conceal("x/hunter2: no such folder") == (
        "x/${oc.env:MIXEDPREC_TEST_SECRET}: no such folder"
    )
    assert "hunter2" not in str({k: v for k, v in preset.resolved.items() if k != "rules"})
    again = load_preset(write("again.json", json.dumps(preset.resolved)))
    assert again.description == "by ${oc.env:MIXEDPREC_TEST_SECRET}"


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["scheme: t{}", "method: '${{schemes.t{}.method}}'"])
def test_thousands_of_mistakes_are_told_in_little_time(write: Write, reference: str) -> None:
    names = [f"{a}{b}{c}{d}" for a in "abcdef" for b in "ghijk" for c in "lmnop" for d in "qrstu"]
    schemes = "".join(f"  s{name}: {{method: fp8}}\n" for name in names)
    rules = "".join(f"  - {{match: '*', {reference.format(name)}}}\n" for name in names)
    path = write("p.yaml", f"version: 1\nschemes:\n{schemes}rules:\n{rules}")
    start = time.process_time()
    with pytest.raises(PresetError) as caught:
        load_preset(path)
    assert time.process_time() - start < 15
    assert len(caught.value.problems) == len(names)
    assert len(str(caught.value)) < 300 * len(names)


@pytest.mark.slow
def test_long_names_are_compared_in_little_time(write: Write) -> None:
    names = [f"{a}{b}{c}" * 20 for a in "abcdef" for b in "ghijk" for c in "lmnop"] * 5
    schemes = "".join(f"  {name}{n}x: {{method: fp8}}\n" for n, name in enumerate(names))
    rules = "".join(f"  - {{match: '*', scheme: {name}y}}\n" for name in names)
    path = write("p.yaml", f"version: 1\nschemes:\n{schemes}rules:\n{rules}")
    start = time.process_time()
    with pytest.raises(PresetError, match="did you mean 'aglaglagl"):
        load_preset(path)
    assert time.process_time() - start < 15


def test_ranges_of_a_whole_preset_are_limited(refuse: Refuse) -> None:
    pattern = "x{}.{{{{0..4999}},{{0..4990}}}}"
    rules = "".join(f"  - {{match: '{pattern.format(n)}', method: fp8}}\n" for n in range(60))
    assert refuse(f"version: 1\nrules:\n{rules}") == [
        "p.yaml:53: rules[50].match: the ranges up to here list more than 500000 numbers; "
        "write '*' or shorter ranges"
    ]


def test_reading_presets_imports_neither_torch_nor_sglang() -> None:
    code = (
        "import sys\n"
        "from mixedprec_plugin.preset.load import load_preset\n"
        "from mixedprec_plugin.methods.registry import METHODS, bind\n"
        "load_preset('attention-fp8-mlp-int4')\n"
        "assert len(METHODS) and bind('int8', {})\n"
        "print(sorted({'torch', 'sglang', 'transformers', 'numpy'} & set(sys.modules)))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
