"""Mistakes that people make with a preset's file, and what they are told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mixedprec_plugin.errors import PresetError
from mixedprec_plugin.preset.load import load_preset, load_resolved
from tests.checkpoints import write_llama
from tests.commands import run

HEAD = "version: 1\nrules:\n"
RULES = HEAD + '  - {match: "*", method: fp8}\n'


def refusal(path: Path | str) -> str:
    """The one thing that is wrong with a preset."""
    with pytest.raises(PresetError) as caught:
        load_preset(path)
    (problem,) = caught.value.problems
    return str(problem)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '  - match: "*"\n   method: fp8\n',
            "4: is not YAML: this line is not indented as the mapping or list of line 3 is; "
            "begin all its keys, or all its dashes, in one column",
        ),
        (
            '  - {match: "*" method: fp8}\n',
            "3: is not YAML: a ',' or '}' is missing before this",
        ),
        (
            '  - {match: "*", method: fp8\n',
            "4: is not YAML: the brackets of line 3 are not closed; add what closes them",
        ),
        (
            '  - {match: "*, method: fp8}\n',
            "4: is not YAML: the quotes of line 3 are not closed; add what closes them",
        ),
        ("\t- match: x\n", "3: is not YAML: found character '\\t' that cannot start any token; "
         "indent with spaces, not tabs"),
    ],
)  # fmt: skip
def test_faults_of_yaml_are_told_in_words(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(HEAD + text)
    assert refusal(path) == f"{path}:{message}"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (json.dumps({"model_type": "llama", "rms_norm_eps": 1e-5}), "is a model's config.json"),
        (json.dumps({"quant_method": "gptq", "bits": 4}), "is a checkpoint's quantization config"),
        (json.dumps({"metadata": {}, "weight_map": {}}), "is the index of a checkpoint"),
        # llm-compressor's own forms: docs/guides of vllm-project/llm-compressor
        (
            "quant_stage:\n  quant_modifiers:\n    GPTQModifier:\n      ignore: [lm_head]\n"
            "      scheme: W4A16\n",
            "is a recipe of llm-compressor",
        ),
        ("DEFAULT_stage:\n  DEFAULT_modifiers: {}\n", "is a recipe of llm-compressor"),
    ],
)
def test_files_of_other_tools_are_named(tmp_path: Path, text: str, kind: str) -> None:
    path = tmp_path / "file.json"
    path.write_text(text)
    assert refusal(path).startswith(f"{path}:1: {kind} (expected a preset); ")


def test_a_suffix_may_be_left_out_or_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_preset("awq.yaml").description == load_preset("awq").description
    (tmp_path / "one.yaml").write_text(RULES)
    assert load_preset("one").path == "one.yaml"
    (tmp_path / "awq.yaml").write_text(RULES + "description: my own\n")
    assert load_preset("awq").description == "my own"
    assert refusal("onee.yaml").endswith("did you mean 'one.yaml'?")
    assert refusal("fp8-blok").endswith("did you mean 'fp8-block' or 'int8-block'?")


@pytest.mark.parametrize("path", ["other", "./other", "../presets/other"])
def test_sources_lie_beside_the_preset_that_names_them(
    tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "presets"
    model, _ = write_llama(tmp_path / "model"), write_llama(folder / "other")
    text = HEAD + '  - {match: "*", method: auto, source: other}\n'
    (folder / "parent.yaml").write_text(f"{text}sources: {{other: {{path: {path}}}}}\n")
    (tmp_path / "child.yaml").write_text("version: 1\nextends: presets/parent\n")
    monkeypatch.chdir(tmp_path)
    for preset in (folder / "parent.yaml", tmp_path / "child.yaml"):
        loaded = load_preset(preset)
        assert loaded.sources["other"].path == str(folder / "other")
        code, _, err = run("plan", "--model", model, "--preset", preset)
        assert (code, err) == (0, "")
    # what is typed counts from where it is typed
    code, _, err = run("plan", "--model", model, "--preset", preset, "--set",
                       "sources.other.path=presets/other")  # fmt: skip
    assert (code, err) == (0, "")


def test_an_id_of_the_hub_is_no_folder_beside(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(
        f"{RULES}sources: {{a: {{path: Qwen/Qwen3-8B-AWQ}}, b: {{path: /models/x}}}}\n"
    )
    sources = load_preset(tmp_path / "p.yaml").sources
    assert [one.path for one in sources.values()] == ["Qwen/Qwen3-8B-AWQ", "/models/x"]


def test_a_list_that_replaces_none_of_the_parent_names_the_one_that_was_meant(
    tmp_path: Path,
) -> None:
    parent = HEAD + '  - {match: "*.${lists.hot}.*", method: fp8}\nlists: {hot: [1]}\n'
    (tmp_path / "parent.yaml").write_text(parent)
    (tmp_path / "p.yaml").write_text("version: 1\nextends: parent\nlists: {hto: [2]}\n")
    assert list(map(str, load_preset(tmp_path / "p.yaml").warnings)) == [
        f"{tmp_path}/p.yaml:3: lists.hto: no pattern uses this list; did you mean 'hot'?"
    ]


def test_a_list_of_a_preset_that_was_resolved_is_not_warned_of(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(HEAD + '  - {match: "*.${lists.hot}.*", method: fp8}\nlists: {hot: [1]}\n')
    resolved = load_preset(path).resolved
    assert "${" not in str(resolved["rules"])
    assert load_resolved(resolved, "config.json").warnings == ()


def test_what_nothing_uses_is_warned_of(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model")
    preset = tmp_path / "p.yaml"
    preset.write_text(
        f"{RULES}schemes:\n  b: {{method: awq}}\nsources:\n  s: {{path: x}}\nlists: {{hot: [1]}}\n"
    )
    added = "schemes.c.method=awq"
    code, _, err = run("plan", "--model", model, "--preset", preset, "--set", added)
    assert code == 0
    unused = f"mixedprec: warning: {preset}"
    assert err.splitlines() == [
        f"{unused}:5: schemes.b: no rule uses this scheme; give it a rule, or take it away",
        f"{unused}:7: sources.s: no rule takes layers from this source; give it a rule",
        f"{unused}:8: lists.hot: no pattern uses this list; give it a rule, or take it away",
        f"mixedprec: warning: --mixedprec-set {added}: no rule uses this scheme; give it a rule, "
        "or take it away",
    ]
