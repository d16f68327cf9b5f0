"""What a rule that matches nothing is told to write matches."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixedprec_plugin.plan.near_globs import NearGlobs
from tests import published
from tests.checkpoints import write_llama
from tests.presets import plan


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("dense") / "model", num_hidden_layers=12)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published.qwen3_30b_a3b(num_layers=2).write(tmp_path_factory.mktemp("sparse") / "model")


def remedy(model: Path, pattern: str) -> str:
    """What the plan says of a rule with a glob that matches nothing."""
    (problem,) = plan(model, f'match: "{pattern}", method: bf16').errors
    assert problem.what == f"{pattern!r} matches no layer of the model"
    assert problem.remedy.endswith("add optional: true if it need not match")
    return problem.remedy


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("layers.*.mlp.*", "model.layers.*.mlp.*"),
        ("model.model.layers.*.mlp.*", "model.layers.*.mlp.*"),
        ("model.layers.*.mlp", "model.layers.*.mlp.*"),
        ("self_attn", "model.layers.*.self_attn.*"),
        ("model.layers.{0..3}.attention.q_proj", "model.layers.{0..3}.self_attn.q_proj"),
        ("*.qproj", "*.q_proj"),
        ("*.Q_PROJ", "*.q_proj"),
    ],
)
def test_the_glob_that_was_meant_is_offered_and_matches(
    dense: Path, written: str, meant: str
) -> None:
    assert remedy(dense, written).startswith(f"did you mean {meant!r}? ")
    assert not plan(dense, f'match: "{meant}", method: bf16').errors


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("model.layers.*.self_attn.qkv_proj", "model.layers.*.self_attn.{q,k,v}_proj"),
        ("*.{0..3}.mlp.gate_up_proj", "*.{0..3}.mlp.{gate,up}_proj"),
    ],
)
def test_a_fused_name_is_offered_its_parts_for_all_layers(
    dense: Path, written: str, meant: str
) -> None:
    assert f"write {meant!r}; " in remedy(dense, written)
    assert not plan(dense, f'match: "{meant}", method: bf16').errors


@pytest.mark.parametrize(
    "written", ["model.layers.{12..13}.*", "model.layers.12.mlp.up_proj", "*.layers.{12,14}.mlp.*"]
)
def test_layers_that_the_model_has_not_are_said_to_be_none(dense: Path, written: str) -> None:
    assert remedy(dense, written).startswith("the model has layers.0 to layers.11; ")


def test_names_with_numbers_in_them_stay_as_they_are_written(tmp_path: Path) -> None:
    model = published.mixtral_8x7b(num_layers=1).write(tmp_path / "model")
    meant = "*.block_sparse_moe.experts.0.w1"
    assert remedy(model, "*.block_sparse_moe.expert.0.w1").startswith(f"did you mean {meant!r}? ")


def test_one_glob_of_several_that_matches_nothing_is_a_warning(dense: Path) -> None:
    globs = 'match: ["*.mlp.down_proj", "*.o_prj"], method: bf16'
    made = plan(dense, globs)
    (problem,) = made.problems
    assert (problem.severity, problem.what) == (
        "warning",
        "'*.o_prj' matches no layer of the model",
    )
    assert problem.remedy.startswith("did you mean '*.o_proj'? ")
    assert not plan(dense, f"{globs}, optional: true").problems


def test_experts_that_the_model_has_not_are_said_to_be_none(sparse: Path) -> None:
    said = remedy(sparse, "model.layers.*.mlp.experts.{128..131}.*")
    assert said.startswith("the model has experts.0 to experts.127; ")


@pytest.mark.parametrize("written", ["*.w1", "*.mlp.experts.*", "*.layers.0-2.mlp.*", "*.nope.*"])
def test_what_is_like_nothing_is_named(dense: Path, written: str) -> None:
    word = next(part for part in written.split(".") if part in ("w1", "experts", "0-2", "nope"))
    assert remedy(dense, written).startswith(f"no layer's name has '{word}' between its dots; ")


@pytest.mark.parametrize("pattern", ["", "..", "{a,{b,c}}.x", "*" * 90, "[ab].y", "{1..3", "-1"])
def test_any_glob_gets_an_answer(pattern: str) -> None:
    names = {"model.layers.0.mlp.up_proj": ("model.layers.0.mlp.gate_up_proj", 1), "": ("", None)}
    assert isinstance(NearGlobs(names).remedy(pattern), str)
