"""Experts of one layer in several schemes."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixedprec_plugin.families.names import ExpertShard, fused_module, layer_kind, scheme_unit
from mixedprec_plugin.families.table import DECODER
from mixedprec_plugin.plan.model import Plan
from mixedprec_plugin.plan.render import group_modules, plan_as_dict
from tests import published
from tests.headers import write_headers
from tests.presets import plan, problem_texts

EXPERTS = "model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen") / "model"
    return published.qwen3_30b_a3b(num_layers=3).write(folder)


def schemes(made: Plan, module: str = EXPERTS) -> dict[str, tuple[int, ...]]:
    return {group.scheme.label: group.experts for group in made.expert_groups[module]}


@pytest.mark.parametrize(
    ("name", "module", "shard"),
    [
        ("l.0.mlp.experts.5.gate_proj", "l.0.mlp.experts", ExpertShard(5, "w1")),
        ("l.0.mlp.experts.5.up_proj", "l.0.mlp.experts", ExpertShard(5, "w3")),
        ("l.0.mlp.experts.12.down_proj", "l.0.mlp.experts", ExpertShard(12, "w2")),
        ("l.0.block_sparse_moe.experts.7.w3", "l.0.block_sparse_moe.experts", ExpertShard(7, "w3")),
    ],
)
def test_projection_of_an_expert_belongs_to_all_experts(
    name: str, module: str, shard: ExpertShard
) -> None:
    assert fused_module(name, {name}, DECODER) == (module, shard)
    assert scheme_unit(module, shard) == f"{module}.{shard.expert}"
    assert layer_kind(name, True, DECODER) == "expert"


def test_shared_expert_is_a_linear_layer_of_its_own() -> None:
    names = [f"l.0.mlp.shared_experts.{p}_proj" for p in ("gate", "up", "down")]
    assert fused_module(names[0], names, DECODER) == ("l.0.mlp.shared_experts.gate_up_proj", 0)
    assert {layer_kind(name, True, DECODER) for name in names} == {"linear"}


def test_experts_are_grouped_by_scheme_in_the_order_of_their_first(qwen: Path) -> None:
    made = plan(
        qwen,
        'match: "*.experts.*", method: gptq',
        'match: "*.layers.1.*.experts.{100..127}.*", method: fp8_block',
        'match: "*.layers.1.*.experts.{5,17}.*", method: int8',
        'match: "*.layers.1.*.experts.99.*", method: bf16',
    )
    assert not made.problems
    assert list(schemes(made).items()) == [
        ("gptq", tuple(e for e in range(99) if e not in (5, 17))),
        ("int8", (5, 17)),
        ("bf16", (99,)),
        ("fp8_block", tuple(range(100, 128))),
    ]
    assert schemes(made, "model.layers.2.mlp.experts") == {"gptq": tuple(range(128))}


def test_experts_without_a_rule_are_as_stored(qwen: Path) -> None:
    made = plan(qwen, f'match: "{EXPERTS}.3.*", method: gptq')
    assert schemes(made) == {
        "as stored": tuple(e for e in range(128) if e != 3), "gptq": (3,),
    }  # fmt: skip


def test_one_expert_needs_one_scheme(qwen: Path) -> None:
    made = plan(
        qwen, 'match: "*.experts.*", method: gptq', f'match: "{EXPERTS}.7.down_proj", method: int8'
    )
    (text,) = problem_texts(made)
    assert text.startswith(
        f"error: {EXPERTS}.7: its shards need one scheme, got gptq for gate_proj ("
    )
    assert "int8 for down_proj (" in text
    assert text.endswith(
        "match all of them with one rule, such as '*.{gate_proj,up_proj,down_proj}', or set "
        "on_fused_conflict: highest"
    )


def test_highest_settles_one_expert(qwen: Path) -> None:
    made = plan(
        qwen,
        'match: "*.experts.*", method: gptq',
        f'match: "{EXPERTS}.7.down_proj", method: int8',
        head="on_fused_conflict: highest\n",
    )
    assert not made.errors
    assert schemes(made)["int8"] == (7,)


def test_rows_show_which_experts_run_in_what(qwen: Path) -> None:
    made = plan(
        qwen,
        'match: "*.experts.*", method: gptq',
        'match: "*.layers.{0,1}.*.experts.{{0..3},17}.*", method: fp8_block',
    )
    rows = {g.name: (g.scheme, g.num_modules) for g in group_modules(made) if "experts" in g.name}
    assert rows == {
        "model.layers.0-1.mlp.experts.0-3,17": ("fp8_block", 2),
        "model.layers.0-1.mlp.experts.4-16,18-127": ("gptq", 2),
        "model.layers.2.mlp.experts.0-127": ("gptq", 1),
    }


def test_json_has_every_expert(qwen: Path) -> None:
    made = plan(qwen, 'match: "*.experts.*", method: gptq')
    layers = {layer["name"]: layer for layer in plan_as_dict(made)["layers"]}
    found = layers[f"{EXPERTS}.127.up_proj"]
    assert (found["module"], found["kind"], found["method"]) == (EXPERTS, "expert", "gptq")
    assert found["shape"] == [768, 2048]
    # 4 bits a weight, 16 of scale and 4 of zero point a group of 128, 32 of g_idx a column
    assert found["bytes"] == 768 * 2048 // 2 + 16 * 768 * 2 + 16 * 768 // 2 + 2048 * 4


def test_router_is_never_quantized(qwen: Path) -> None:
    made = plan(qwen, 'match: "*", method: gptq')
    assert made.by_name["model.layers.0.mlp.gate"].scheme is None
    (text,) = problem_texts(plan(qwen, 'match: "*.mlp.gate", method: gptq'))
    assert "model.layers.0-2.mlp.gate cannot run in gptq: routers stay unquantized" in text


def test_router_keeps_the_dtype_that_it_is_stored_in(tmp_path: Path) -> None:
    """SGLang holds both in float32; bfloat16 biases would not tell some experts apart."""
    tensors = {
        "model.layers.0.mlp.gate.weight": ("F32", (8, 64)),
        "model.layers.0.mlp.gate.e_score_correction_bias": ("F32", (8,)),
        "model.norm.weight": ("F32", (64,)),
    }
    made = plan(write_headers(tmp_path / "m", {}, tensors), 'match: "*", method: bf16')
    gate = made.by_name["model.layers.0.mlp.gate"].outputs
    assert {spec.dtype for spec in gate.values()} == {"F32"}
    assert made.by_name["model.norm"].outputs["weight"].dtype == "BF16"


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ("{3,128}", "names expert 128, and the model's layers have 128 (expected 0 to 127)"),
        ("{0,130,131,200}", "names experts 130-131,200, and the model's layers have 128"),
    ],
)
def test_experts_that_no_layer_has_are_an_error(qwen: Path, ids: str, message: str) -> None:
    made = plan(qwen, f'match: "*.experts.{ids}.*", method: gptq')
    (text,) = problem_texts(made)
    assert message in text
    assert not plan(qwen, f'match: "*.experts.{ids}.*", method: gptq, optional: true').problems


def test_range_may_reach_beyond_the_last_expert(qwen: Path) -> None:
    assert not plan(qwen, 'match: "*.experts.{100..999}.*", method: gptq').problems


def test_layers_are_counted_from_the_end_without_those_of_a_draft_model(tmp_path: Path) -> None:
    model = published.glm_4_5_air(num_layers=2).write(tmp_path / "m")
    made = plan(model, 'match: "*.layers.-1.mlp.experts.*", method: gptq')
    assert list(schemes(made)) == ["gptq"]
    assert list(made.expert_groups) == [EXPERTS]


def test_rule_for_a_draft_models_layer_alone_is_an_error(tmp_path: Path) -> None:
    model = published.glm_4_5_air(num_layers=2).write(tmp_path / "m")
    (text,) = problem_texts(plan(model, 'match: "model.layers.2.*", method: gptq'))
    assert "cannot run in gptq: the model does not run it, a draft model for specul" in text
