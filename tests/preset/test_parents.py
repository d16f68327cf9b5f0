from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixedprec_plugin.errors import PresetError
from mixedprec_plugin.preset.load import load_preset
from tests.preset.conftest import Write


def rules(*patterns: str, method: str = "awq") -> str:
    lines = "".join(f"  - {{match: '{pattern}', method: {method}}}\n" for pattern in patterns)
    return f"rules:\n{lines}"


def messages(path: Path | str) -> list[str]:
    with pytest.raises(PresetError) as caught:
        load_preset(path)
    return [str(problem) for problem in caught.value.problems]


def test_parents_merge_first_and_child_overrides(write: Write) -> None:
    write(
        "base.yaml",
        "version: 1\ndescription: base\non_fused_conflict: highest\n"
        "sources: {s: {path: base}, t: {path: base}}\n"
        "schemes: {a: {method: gptq, group_size: 32}, b: {method: awq}}\n"
        "rules:\n  - {match: '*', scheme: a}\n",
    )
    child = write(
        "child.yaml",
        "version: 1\nextends: base\ndescription: child\nsources: {t: {path: child}}\n"
        "schemes: {a: {method: gptq, source: t}}\nrules:\n  - {match: '*.q', scheme: b}\n",
    )
    preset = load_preset(child)
    assert preset.files == ("base.yaml", "child.yaml")
    assert preset.path == "child.yaml"
    assert preset.description == "child"
    assert preset.on_fused_conflict == "highest"
    assert {name: source.path for name, source in preset.sources.items()} == {
        "s": "base",
        "t": "child",
    }
    assert [rule.patterns for rule in preset.rules] == [("*",), ("*.q",)]
    assert preset.rules[0].scheme.arguments["group_size"] == 128
    assert [rule.index for rule in preset.rules] == [0, 1]
    assert [str(rule.location) for rule in preset.rules] == [
        "base.yaml:7: rules[0]",
        "child.yaml:7: rules[0]",
    ]


def test_several_parents_merge_in_order(write: Write) -> None:
    write("a.yaml", "version: 1\nextends: base\n" + rules("a"))
    write("b.yml", "version: 1\nextends: base\n" + rules("b"))
    write("base.yaml", "version: 1\n" + rules("base"))
    child = write("c.yaml", "version: 1\nextends: [a, b]\n" + rules("c"))
    preset = load_preset(child)
    assert preset.files == ("base.yaml", "a.yaml", "b.yml", "c.yaml")
    assert [rule.patterns[0] for rule in preset.rules] == ["base", "a", "b", "c"]


def test_relative_paths_start_at_the_child(write: Write) -> None:
    write("one/base.yaml", "version: 1\n" + rules("base"))
    child = write("two/child.yaml", "version: 1\nextends: ../one/base.yaml\n")
    assert load_preset(child).files == ("one/base.yaml", "two/child.yaml")


def test_packaged_preset_can_be_extended_and_one_beside_goes_first(write: Write) -> None:
    child = write("child.yaml", "version: 1\nextends: awq\n" + rules("*.q", method="fp8"))
    assert [rule.scheme.method for rule in load_preset(child).rules] == ["awq", "fp8"]
    write("awq.yaml", "version: 1\n" + rules("*", method="gptq"))
    assert [rule.scheme.method for rule in load_preset(child).rules] == ["gptq", "fp8"]


def test_unknown_parent_names_the_nearest(write: Write) -> None:
    write("base.yaml", "version: 1\n" + rules("*"))
    child = write("child.yaml", "version: 1\nextends: [bsae]\n")
    (message,) = messages(child)
    assert message.startswith("child.yaml:2: extends[0]: there is no preset 'bsae' beside this one")
    assert message.endswith("; did you mean 'base'?")


def test_cycle_names_the_chain(write: Write) -> None:
    write("a.yaml", "version: 1\nextends: b\n" + rules("*"))
    write("b.yaml", "version: 1\nextends: sub/c\n")
    write("sub/c.yaml", "version: 1\nextends: ../a\n")
    assert messages("a.yaml") == [
        "sub/c.yaml:2: extends: extends itself: a.yaml -> b.yaml -> sub/c.yaml -> a.yaml; "
        "take one of these 'extends' away"
    ]


def test_preset_that_extends_itself_is_a_cycle(write: Write) -> None:
    path = write("a.yaml", "version: 1\nextends: a\n" + rules("*"))
    assert messages(path) == [
        "a.yaml:2: extends: extends itself: a.yaml -> a.yaml; take one of these 'extends' away"
    ]


def test_interpolated_parent_is_refused(write: Write) -> None:
    path = write("a.yaml", "version: 1\nextends: ${oc.env:HOME}\n" + rules("*"))
    assert messages(path) == [
        "a.yaml:2: extends: '${oc.env:HOME}' is an interpolation (expected a name or a path); "
        "parents are read before interpolations; write the name out"
    ]


def test_problems_of_parents_are_found_too_and_sorted_by_file(write: Write) -> None:
    write("base.yaml", "schemes: []\nrules:\n  - {match: '*', method: awk}\n")
    path = write("a.yaml", "version: 1\nextends: base\nrules:\n  - {match: '*', scheme: x}\n")
    assert [message.partition(": ")[0] for message in messages(path)] == [
        "base.yaml:1",
        "base.yaml:1",
        "base.yaml:3",
        "a.yaml:4",
    ]


def test_broken_parent_does_not_hide_what_is_wrong_in_the_child(write: Write) -> None:
    write("base.yaml", "a: b: c\n")
    path = write("a.yaml", "version: 1\nextends: base\ndescription: on\n")
    assert [message.partition(": ")[0] for message in messages(path)] == ["base.yaml:1", "a.yaml:3"]


def test_too_many_files_are_refused(write: Write) -> None:
    for number in range(70):
        write(f"p{number}.yaml", f"version: 1\nextends: p{number + 1}\n" + rules("*"))
    write("p70.yaml", "version: 1\n" + rules("*"))
    assert messages("p0.yaml") == [
        "p63.yaml:2: extends: more than 64 files extend one another; extend fewer"
    ]


names = st.sampled_from(["a", "b", "c", "d"])
schemes = st.dictionaries(names, st.sampled_from([32, 64, 128]), max_size=3)
patterns = st.lists(st.sampled_from(["*", "*.q", "*.k", "x.{0..3}.*"]), max_size=3)
generations = st.lists(st.tuples(schemes, patterns), min_size=2, max_size=4)


@given(generations)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_chain_merges_like_dicts_and_lists(
    write: Write, chain: list[tuple[dict[str, int], list[str]]]
) -> None:
    merged: dict[str, int] = {}
    expected: list[str] = []
    for number, (sizes, wanted) in enumerate(chain):
        merged |= sizes
        expected += wanted
        content = {
            "version": 1,
            "schemes": {
                name: {"method": "awq", "group_size": size} for name, size in sizes.items()
            },
            "rules": [{"match": pattern, "method": "awq"} for pattern in wanted],
        }
        if number:
            content["extends"] = f"g{number - 1}"
        else:
            content["rules"] = [{"match": "first", "method": "fp8"}, *content["rules"]]
        write(f"g{number}.yaml", yaml.safe_dump(content))
    preset = load_preset(f"g{len(chain) - 1}.yaml")
    assert [rule.patterns[0] for rule in preset.rules] == ["first", *expected]
    sizes = {name: scheme["group_size"] for name, scheme in preset.resolved["schemes"].items()}
    assert sizes == merged
