"""The section `draft`: rules for the draft model of speculative decoding."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mixedprec_plugin.errors import PresetError
from mixedprec_plugin.preset.load import load_preset
from mixedprec_plugin.preset.model import Preset

TEXT = """
version: 1
sources:
  int4: {path: /nowhere}
schemes:
  fine: {method: fp8_block}
lists:
  first: ["0..1"]
rules:
  - {match: "*", method: bf16}
draft:
  on_fused_conflict: highest
  rules:
    - {match: "model.layers.${lists.first}.*", scheme: fine}
    - {match: "*.down_proj", method: gptq, source: int4}
"""


def load(folder: Path, text: str, *overrides: str) -> Preset:
    path = folder / "preset.yaml"
    path.write_text(text, encoding="utf-8")
    return load_preset(path, overrides)


def test_draft_is_a_preset_that_shares_sources_schemes_and_lists(tmp_path: Path) -> None:
    preset = load(tmp_path, TEXT)
    draft = preset.draft
    assert draft is not None
    assert [rule.patterns for rule in draft.rules] == [
        ("model.layers.{0..1}.*",), ("*.down_proj",)
    ]  # fmt: skip
    assert [rule.scheme.method for rule in draft.rules] == ["fp8", "gptq"]
    assert (draft.on_fused_conflict, preset.on_fused_conflict) == ("highest", "error")
    assert [rule.location.line for rule in draft.rules] == [14, 15]
    # what only the draft uses is used
    assert preset.warnings == ()


def test_preset_without_the_section_has_no_draft(tmp_path: Path) -> None:
    assert load(tmp_path, TEXT.partition("draft:")[0]).draft is None


def test_resolved_draft_is_the_same_preset(tmp_path: Path) -> None:
    draft = load(tmp_path, TEXT).draft
    assert draft is not None
    again = load(tmp_path, yaml.safe_dump(draft.resolved))
    assert [rule.scheme for rule in again.rules] == [rule.scheme for rule in draft.rules]
    whole = load(tmp_path, yaml.safe_dump(load(tmp_path, TEXT).resolved))
    assert whole.draft is not None
    assert [rule.patterns for rule in whole.draft.rules] == [r.patterns for r in draft.rules]


def test_override_reaches_into_the_section(tmp_path: Path) -> None:
    draft = load(tmp_path, TEXT, "draft.rules.1.method=awq").draft
    assert draft is not None
    assert draft.rules[1].scheme.method == "awq"


def test_draft_of_a_child_takes_the_place_of_its_parents(tmp_path: Path) -> None:
    (tmp_path / "parent.yaml").write_text(TEXT, encoding="utf-8")
    child = 'version: 1\nextends: parent\ndraft: {rules: [{match: "*", method: int8}]}\n'
    draft = load(tmp_path, child).draft
    assert draft is not None
    assert [rule.scheme.method for rule in draft.rules] == ["blockwise_int8"]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("draft: fp8", r"preset.yaml:4: draft: 'fp8' is text \(expected a mapping\)"),
        ("draft: {}", r"preset.yaml:4: draft: 'rules' is missing"),
        ("draft: {rules: []}", r"draft.rules: \[\] is empty \(expected at least one\)"),
        (
            'draft: {rules: [{match: "*"}]}',
            r"draft.rules\[0\]: no method is named; add 'method:' with its arguments, or 'scheme",
        ),
        (
            'draft: {rules: [{match: "*", scheme: fine}]}',
            r"draft.rules\[0\].scheme: unknown scheme 'fine' \(the preset has no 'schemes'\)",
        ),
        (
            'draft: {rules: [{match: "*", method: gptq, group: 64}]}',
            r"draft.rules\[0\].group: unknown key 'group'",
        ),
        (
            'draft: {rule: [], rules: [{match: "*", method: fp8}]}',
            r"draft.rule: unknown key 'rule' \(expected rules, on_fused_conflict\); did you mean",
        ),
    ],
)
def test_mistake_in_the_section_is_told_by_line(tmp_path: Path, section: str, message: str) -> None:
    text = f'version: 1\nrules:\n  - {{match: "*", method: bf16}}\n{section}\n'
    with pytest.raises(PresetError, match=message):
        load(tmp_path, text)
