"""The shipped presets for mixtures of experts, over the headers of published models."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from mixedprec_plugin.checkpoint.source import Source, open_source
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.plan.model import Plan
from mixedprec_plugin.plan.resolve import resolve_plan
from mixedprec_plugin.preset.load import load_preset
from mixedprec_plugin.resources import preset_dir
from tests import published
from tests.presets import problem_texts

Open = Callable[..., Source]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Open:
    """Open a model of tests/published.py, written once."""
    folder = tmp_path_factory.mktemp("published")
    known: dict[str, Source] = {}

    def open_once(name: str, **shape: int) -> Source:
        key = f"{name} {shape}"
        if key not in known:
            known[key] = open_source(getattr(published, name)(**shape).write(folder / key))
        return known[key]

    return open_once


def resolve(preset: str, source: Source, tp_size: int = 1, *overrides: str) -> Plan:
    return resolve_plan(load_preset(preset, overrides), source, Target(tp_size=tp_size))


def groups(made: Plan, module: str) -> dict[str, tuple[int, ...]]:
    return {group.scheme.label: group.experts for group in made.expert_groups[module]}


EXAMPLES = [
    ("qwen3-30b-a3b", "qwen3_30b_a3b", (1, 2, 4), (8,)),
    ("mixtral-8x7b", "mixtral_8x7b", (1, 2, 4, 8), ()),
    ("glm-4.5-air", "glm_4_5_air", (1, 2), (4,)),
    ("deepseek-v3", "deepseek_v3", (8,), ()),
]


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "model", "fits", "fits_not"), EXAMPLES)
def test_example_has_the_size_and_fits_the_ranks_that_it_says(
    opened: Open, preset: str, model: str, fits: tuple[int, ...], fits_not: tuple[int, ...]
) -> None:
    planned = [resolve(preset, opened(model), tp_size) for tp_size in fits]
    assert [made.errors for made in planned] == [()] * len(fits)
    for tp_size in fits_not:
        assert resolve(preset, opened(model), tp_size).errors
    header = (preset_dir() / f"{preset}.yaml").read_text(encoding="utf-8")
    said = re.search(r"in about (\d+) GiB", header)
    assert said is not None
    assert planned[0].bytes_after / 2**30 == pytest.approx(float(said[1]), rel=0.02)


def test_qwen3_is_finer_at_both_ends(opened: Open) -> None:
    made = resolve("qwen3-30b-a3b", opened("qwen3_30b_a3b"))
    assert not made.problems
    labels = [list(groups(made, f"model.layers.{i}.mlp.experts")) for i in range(48)]
    assert labels == [["ends"]] * 2 + [["experts"]] * 44 + [["ends"]] * 2
    assert {layer.method for layer in made.layers if layer.kind == "router"} == {"bf16"}


def test_mixtral_names_its_projections_otherwise(opened: Open) -> None:
    made = resolve("mixtral-8x7b", opened("mixtral_8x7b"))
    assert not made.problems
    expert = made.by_name["model.layers.5.block_sparse_moe.experts.7.w2"]
    assert (expert.method, expert.module) == ("awq", "model.layers.5.block_sparse_moe.experts")
    assert made.by_name["model.layers.31.block_sparse_moe.experts.7.w2"].method == "fp8"
    assert made.by_name["model.layers.5.self_attn.k_proj"].method == "fp8"


@pytest.mark.slow
def test_deepseek_keeps_what_is_stored_and_rounds_the_rest_twice(opened: Open) -> None:
    made = resolve("deepseek-v3", opened("deepseek_v3"), 8)
    assert [p.rule for p in made.problems] == ["loss"]
    assert made.problems[0].severity == "warning"
    actions = {layer.name: layer.action for layer in made.layers}
    assert actions["model.layers.30.self_attn.kv_b_proj"] == "as stored"
    assert actions["model.layers.5.mlp.experts.255.up_proj"] == "as stored"
    assert actions["model.layers.6.mlp.experts.255.up_proj"] == "requantize"
    assert actions["model.layers.30.mlp.shared_experts.up_proj"] == "as stored"


def test_glm_leaves_what_does_not_fit(opened: Open) -> None:
    made = resolve("glm-4.5-air", opened("glm_4_5_air", num_layers=10), 2)
    assert not made.problems
    assert made.by_name["model.layers.0.mlp.down_proj"].method == "bf16"
    assert made.by_name["model.layers.9.mlp.shared_experts.down_proj"].method == "fp8"
    assert list(groups(made, "model.layers.4.mlp.experts")) == ["first"]
    assert list(groups(made, "model.layers.5.mlp.experts")) == ["experts"]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["glm_4_5_air", "deepseek_v3"])
def test_layer_of_multi_token_prediction_is_left_to_a_draft_model(opened: Open, model: str) -> None:
    source = opened(model)
    made = resolve("glm-4.5-air" if "glm" in model else "deepseek-v3", source)
    first = f"model.layers.{source.config['num_hidden_layers']}."
    drafts = [layer for layer in made.layers if layer.name.startswith(first)]
    assert len(drafts) > 300
    assert {layer.kind for layer in drafts} == {"draft"}
    assert {(layer.scheme, layer.bytes_after, layer.note) for layer in drafts} == {
        (None, 0, "left to a draft model")
    }
    assert all(layer.kind != "draft" for layer in made.layers if not layer.name.startswith(first))


def test_block_fp8_does_not_fit_glms_dense_layer(opened: Open) -> None:
    """10944 is 85.5 blocks of 128."""
    made = resolve("fp8-block", opened("glm_4_5_air", num_layers=8))
    assert [text.partition(";")[0] for text in problem_texts(made)] == [
        "error: model.layers.0.mlp.down_proj: K = 10944 is not a multiple of 128, the block size "
        "along K and the group of its activations",
        "error: model.layers.0.mlp.gate_proj, model.layers.0.mlp.up_proj: N = 10944 of a shard of "
        "its fused module is not a multiple of 128, the block size along N",
    ]


GENERIC = ["moe-experts-int4", "moe-experts-awq", "moe-finer-first-shared", "moe-hot-experts"]


@pytest.mark.parametrize("preset", GENERIC)
@pytest.mark.parametrize("model", ["qwen3_30b_a3b", "mixtral_8x7b", "glm_4_5_air"])
def test_generic_preset_fits_every_unquantized_model(opened: Open, preset: str, model: str) -> None:
    assert resolve(preset, opened(model, num_layers=8)).problems == ()


@pytest.mark.parametrize("preset", GENERIC)
def test_generic_preset_asks_before_it_rounds_deepseeks_experts_twice(
    opened: Open, preset: str
) -> None:
    made = resolve(preset, opened("deepseek_v3", num_layers=8))
    assert {p.rule for p in made.errors} == {"stored-format"}
    assert all("or requantize: true" in p.remedy for p in made.errors)


def test_shared_experts_follow_their_own_rule(opened: Open) -> None:
    made = resolve("moe-finer-first-shared", opened("glm_4_5_air", num_layers=8))
    shared = made.by_name["model.layers.7.mlp.shared_experts.up_proj"]
    routed = made.by_name["model.layers.7.mlp.experts.0.up_proj"]
    assert (shared.scheme and shared.scheme.label) == "shared"
    assert (routed.scheme and routed.scheme.label) == "experts"


def test_hot_experts_come_from_a_file(opened: Open, tmp_path: Path) -> None:
    hot = tmp_path / "hot.yaml"
    hot.write_text('version: 1\nextends: moe-hot-experts\nlists: {hot: [5, 17, "120..127"]}\n')
    made = resolve(str(hot), opened("qwen3_30b_a3b", num_layers=8))
    assert not made.problems
    expected = (5, 17, *range(120, 128))
    for layer in (0, 7):
        assert groups(made, f"model.layers.{layer}.mlp.experts")["hot"] == expected


def test_hot_experts_may_differ_by_layer(opened: Open, tmp_path: Path) -> None:
    hot = tmp_path / "hot.yaml"
    hot.write_text(
        "version: 1\nextends: moe-experts-int4\n"
        'lists:\n  hot: ["*.layers.0.*.experts.{3,17}.*", "*.layers.1.*.experts.5.*"]\n'
        'rules: [{match: "${lists.hot}", method: fp8_block}]\n'
    )
    made = resolve(str(hot), opened("qwen3_30b_a3b", num_layers=8))
    assert not made.problems
    found = [
        groups(made, f"model.layers.{i}.mlp.experts").get("fp8_block") for i in range(3)
    ]  # fmt: skip
    assert found == [(3, 17), (5,), None]


def test_list_of_another_model_is_refused(opened: Open) -> None:
    made = resolve("moe-hot-experts", opened("mixtral_8x7b"), 1, "lists.hot=[3,8,120]")
    assert [(p.rule, p.what, p.remedy) for p in made.problems] == [
        (
            "expert-ids",
            "names experts 8,120, and the model's layers have 8 (expected 0 to 7)",
            "take them out, or write optional: true",
        )
    ]


def test_files_of_the_header_are_presets(opened: Open, tmp_path: Path) -> None:
    header = (preset_dir() / "moe-hot-experts.yaml").read_text(encoding="utf-8")
    shown = re.findall(r"^#               (version: 1\n(?:#               .*\n)+)", header, re.M)
    assert len(shown) == 2
    for number, text in enumerate(shown):
        file = tmp_path / f"{number}.yaml"
        file.write_text(re.sub(r"^#               ", "", text, flags=re.M))
        made = resolve(str(file), opened("qwen3_30b_a3b", num_layers=8))
        assert not made.problems
        assert len(made.expert_groups["model.layers.0.mlp.experts"]) == 2
