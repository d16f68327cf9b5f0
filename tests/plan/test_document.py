"""The plan's document: what the page is told, read back as the page reads it."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mixedprec_plugin.methods.cards import find_gpu
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.plan.document import names_in_order, plan_document
from mixedprec_plugin.plan.model import Plan
from tests import published
from tests.checkpoints import write_llama
from tests.presets import plan

_H100 = Target(tp_size=2, gpu=find_gpu("H100"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepseek") / "model"
    return published.deepseek_v3(5).write(folder)


def _document(made: Plan) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(plan_document(made)))
    return found


def _layers(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], list[int]]]:
    """Name, form and matching rules of each layer."""

    def spread(runs: list[int]) -> list[int]:
        return [v for v, n in zip(runs[::2], runs[1::2], strict=True) for _ in range(n)]

    for template in document["layers"]:
        for block, experts, forms, matches in template["rows"]:
            numbers = experts if isinstance(experts, list) else range(experts)
            pairs = zip(spread(document["runs"][forms]), spread(document["runs"][matches]))  # noqa: B905
            for place, (form, match) in enumerate(pairs):
                name = template["name"]
                if block >= 0:
                    name = name.replace("{}", str(block), 1)
                if experts != 0:
                    name = name.replace("{}", str(numbers[place]), 1)
                yield name, document["forms"][form], document["matches"][match]


def test_layers_are_those_of_the_checkpoint_with_their_bytes(deepseek: Path) -> None:
    rules = published.single_expert_rules(published.deepseek_v3(5)).splitlines()
    lines = [line.partition("{")[2][:-1] for line in rules]
    made = plan(deepseek, 'match: "*.experts.*", method: gptq, requantize: true', *lines)
    document = _document(made)
    found = {name: form["bytes"] for name, form, _ in _layers(document)}
    index = json.loads((deepseek / "model.safetensors.index.json").read_text())
    stored = {name.rpartition(".")[0] for name in index["weight_map"]}
    assert found.keys() == stored
    assert found == {layer.name: layer.bytes_after for layer in made.layers}
    assert names_in_order(made) == list(found)
    # 1,000 layers of experts and more, of a few forms
    assert len(document["forms"]) < 50 < 1000 < len(found)


def test_matching_rules_are_told_in_order_shadowed_ones_too(llama: Path) -> None:
    patterns = ["*", "*.mlp.*", "model.layers.1.*", "*.down_proj"]
    made = plan(llama, *(f'match: "{p}", method: fp8' for p in patterns))
    for name, _, matches in _layers(_document(made)):
        assert matches == [k for k, p in enumerate(patterns) if fnmatch.fnmatchcase(name, p)]


@pytest.mark.parametrize("target", [Target(), _H100], ids=["any", "two H100"])
def test_choice_is_what_a_plan_of_that_method_says(llama: Path, target: Target) -> None:
    document = _document(plan(llama, 'match: "*", method: fp8', target=target))
    forms = {name: form for name, form, _ in _layers(document)}
    for number, method in enumerate(document["choices"]["methods"]):
        written = ", ".join(f"{k}: {json.dumps(v)}" for k, v in method["given"].items())
        made = plan(llama, f'match: "*", requantize: true, {written}', target=target)
        wrong = {p.where for p in made.errors}
        for layer in made.layers:
            if (choices := forms[layer.name]["choices"]) is None:
                assert layer.scheme is None
                continue
            num_bytes, action, why_not, _ = document["choices"]["lists"][choices][number]
            assert layer.scheme is not None
            assert (num_bytes, layer.scheme.summary) == (layer.bytes_after, method["summary"])
            assert action == layer.action
            assert bool(why_not) == any(_names(text, layer.name) for text in wrong)


def _names(where: str, name: str) -> bool:
    """Whether a folded `where` names a layer of this small model: its last part is unique."""
    return any(part.endswith(name.rpartition(".")[2]) for part in where.split(", "))


def test_fault_stands_at_its_layers_and_its_rule(llama: Path) -> None:
    made = plan(
        llama, 'match: "*.q_proj", method: fp8', 'match: "*.kk_proj", method: fp8',
        'match: "*.1.mlp.down_proj", method: gptq_int8, group_size: 64, desc_act: true',
        target=_H100,
    )  # fmt: skip
    document = _document(made)
    rules = {p["rule"]: p for p in document["problems"]}
    at: dict[str, set[str]] = {}
    for name, form, _ in _layers(document):
        for number in form["problems"]:
            at.setdefault(document["problems"][number]["rule"], set()).add(name)
    parts = ("q_proj", "k_proj", "v_proj")
    assert at["fused-conflict"] == {
        f"model.layers.{n}.self_attn.{part}" for n in range(3) for part in parts
    }
    assert rules["fused-conflict"]["layers"] == 9
    forms = {name: form for name, form, _ in _layers(document)}
    # a layer with an error runs in no kernel, its neighbour in cuBLAS's
    assert forms["model.layers.1.mlp.down_proj"]["kernel"] == ""
    assert forms["model.layers.0.mlp.down_proj"]["kernel"] == "mm"
    assert at["conversion"] == {"model.layers.1.mlp.down_proj"}
    assert rules["unmatched-rule"]["rules"] == [1]


def test_card_tells_what_a_token_of_the_cache_takes(llama: Path) -> None:
    made = plan(llama, 'match: "*", method: fp8', target=_H100)
    card = _document(made)["card"]
    # 3 layers, on each of two ranks one head's keys and values of 64 numbers of 2 bytes
    assert card["token_bytes"] == 3 * 2 * 64 * 2
    assert card["memory"] == 80_000_000_000
    assert _document(plan(llama, 'match: "*", method: fp8'))["card"] is None
    bare = dataclasses.replace(_H100, gpu=find_gpu("9.0"))
    unknown = _document(plan(llama, 'match: "*", method: fp8', target=bare))["card"]
    assert "memory of compute capability 9.0 is not known" in unknown["unknown"]
