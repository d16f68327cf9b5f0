"""Norms and their consumers of two sources, on slices that AutoAWQ folded and on their original."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mixedprec_plugin.plan.model import Plan
from mixedprec_plugin.plan.render import plan_as_dict, summary_lines
from tests.commands import run_without_torch
from tests.plan.mixtures import (
    ATTENTION,
    INPUT_NORM,
    MLP,
    MLP_NORM,
    mixed_plan,
    slice_checkpoint,
    slice_tensors,
)
from tests.presets import problem_texts, write_preset

V_OF_AWQ = 'match: "*.v_proj", method: awq, group_size: 64, source: awq'
Mix = Callable[..., Plan]


@pytest.fixture
def mix(tmp_path: Path) -> Mix:
    """Plan rules over the bf16 slices as `model` and AutoAWQ's as `awq`."""
    model = slice_checkpoint(tmp_path / "model", "bf16")
    awq = slice_checkpoint(tmp_path / "awq", "autoawq-g64")

    def plan(*lines: str, **options: Any) -> Plan:
        return mixed_plan(model, *lines, awq=awq, **options)

    return plan


def decided(plan: Plan, name: str) -> tuple[str, str, str | None]:
    """Source, action, and the source of the norm that a layer is rescaled to."""
    layer = plan.by_name[name]
    return layer.source, layer.action, layer.rescale.source if layer.rescale else None


# what other tests look at
_ELSEWHERE = ("does not run on CUDA", "scales are rounded", "no rule takes layers")


def without_cuda(plan: Plan) -> list[str]:
    return [text for text in problem_texts(plan) if not any(w in text for w in _ELSEWHERE)]


def test_plan_of_one_source_is_left_as_it_is(tmp_path: Path) -> None:
    model = slice_checkpoint(tmp_path / "model", "autoawq-g64")
    plan = mixed_plan(model, 'match: "*", method: awq, group_size: 64', same=model)
    assert not without_cuda(plan)
    assert not any(layer.rescale or layer.note for layer in plan.layers)


def test_norm_follows_what_is_taken_as_stored_and_the_rest_is_rescaled(mix: Mix) -> None:
    plan = mix(V_OF_AWQ, 'match: "*.k_proj", method: fp8')
    assert not without_cuda(plan)
    assert decided(plan, INPUT_NORM) == ("awq", "as stored", None)
    assert decided(plan, f"{ATTENTION}v_proj") == ("awq", "as stored", None)
    assert decided(plan, f"{ATTENTION}k_proj") == ("model", "quantize", "awq")
    assert decided(plan, MLP_NORM) == ("model", "as stored", None)


def test_bf16_layer_that_is_rescaled_is_cast_to_the_same_bytes(mix: Mix) -> None:
    plan = mix(V_OF_AWQ)
    layer = plan.by_name[f"{ATTENTION}k_proj"]
    assert decided(plan, layer.name) == ("model", "cast", "awq")
    assert layer.bytes_after == layer.bytes_before == 2 * 192 * 576


def test_norm_of_consumers_that_all_come_from_one_source_follows_them(mix: Mix) -> None:
    plan = mix('match: "*.{gate,up,down}_proj", method: awq, group_size: 64, source: awq')
    assert not without_cuda(plan)
    assert decided(plan, MLP_NORM) == ("awq", "as stored", None)
    assert plan.by_name[MLP_NORM].note == "follows its consumers"
    assert not any(layer.rescale for layer in plan.layers)
    assert decided(plan, INPUT_NORM) == ("model", "as stored", None)


def test_where_all_consumers_change_the_norm_stays_and_those_from_elsewhere_do(mix: Mix) -> None:
    plan = mix('match: "*.v_proj", method: bf16, source: awq')
    assert decided(plan, INPUT_NORM) == ("model", "as stored", None)
    assert decided(plan, f"{ATTENTION}v_proj") == ("awq", "dequantize", "model")
    assert decided(plan, f"{ATTENTION}k_proj") == ("model", "as stored", None)


def test_requantized_layer_is_rescaled(mix: Mix) -> None:
    rule = 'match: "*.v_proj", method: gptq, group_size: 64, requantize: true, source: awq'
    plan = mix(rule, 'match: "*.k_proj", method: int8, optional: true')
    assert decided(plan, f"{ATTENTION}v_proj") == ("awq", "requantize", "model")


def test_rule_for_norms_alone_decides_their_source(mix: Mix) -> None:
    plan = mix(
        'match: "*.v_proj", method: bf16, source: awq',
        'match: "*.input_layernorm", method: bf16, source: awq',
    )
    assert not plan.errors
    assert decided(plan, INPUT_NORM) == ("awq", "as stored", None)
    assert decided(plan, f"{ATTENTION}v_proj") == ("awq", "dequantize", None)
    assert decided(plan, f"{ATTENTION}k_proj") == ("model", "cast", "awq")


def test_rule_for_norms_that_contradicts_their_consumers_is_an_error(mix: Mix) -> None:
    plan = mix(V_OF_AWQ, 'match: "*norm", method: bf16')
    (problem,) = plan.errors
    assert problem.where.endswith("preset.yaml:6: rules[1]")
    assert str(problem).endswith(
        "takes input_layernorm from 'model', which is wrong for v_proj of 'awq' (expected 'awq'; "
        "the two differ by up to 9.8x); take the norm from 'awq' or remove the rule"
    )


def test_star_rule_does_not_fix_the_source_of_norms(mix: Mix) -> None:
    plan = mix(
        'match: "*", method: bf16, source: awq',
        'match: "*.{k,v}_proj", method: bf16',
        'match: "*.{gate,up,down}_proj", method: awq, group_size: 64, source: awq',
    )
    assert not plan.errors
    assert decided(plan, INPUT_NORM) == ("model", "as stored", None)
    assert decided(plan, MLP_NORM) == ("awq", "as stored", None)


def test_two_groups_that_cannot_change_are_an_error_that_names_the_unit(
    mix: Mix, tmp_path: Path
) -> None:
    # the same codes behind another norm: what a second tool would have folded
    tensors = slice_tensors("autoawq-g64")
    other = slice_checkpoint(
        tmp_path / "other",
        "autoawq-g64",
        {f"{INPUT_NORM}.weight": tensors[f"{INPUT_NORM}.weight"] * 2},
    )
    plan = mix(
        V_OF_AWQ,
        'match: "*.k_proj", method: awq, group_size: 64, source: other',
        other=other,
    )
    (problem,) = plan.errors
    assert str(problem) == (
        "model.layers.0.input_layernorm: no norm is right for both k_proj of 'other' and v_proj of "
        "'awq': they are stored behind their own, which differ by up to 2.0x; take all of them "
        "from one source, or have one side quantized here from bf16"
    )


def test_copies_of_a_norm_in_other_dtypes_are_one_norm(mix: Mix, tmp_path: Path) -> None:
    weight = slice_tensors("bf16")[f"{INPUT_NORM}.weight"]
    k = slice_tensors("autoawq-g64")
    changed = {f"{INPUT_NORM}.weight": (weight.float() * (1 + 2.0**-9.5))}
    same = slice_checkpoint(tmp_path / "same", "autoawq-g64", {**k, **changed})
    plan = mix('match: "*.v_proj", method: awq, group_size: 64, source: same', same=same)
    assert not plan.errors
    assert decided(plan, INPUT_NORM) == ("model", "as stored", None)
    assert not any(layer.rescale for layer in plan.layers)


def test_source_without_the_norm_cannot_be_told(mix: Mix, tmp_path: Path) -> None:
    bare = slice_checkpoint(tmp_path / "bare", "autoawq-g64", {f"{INPUT_NORM}.weight": None})
    rule = 'match: "*.v_proj", method: awq, group_size: 64, source: bare'
    (problem,) = mix(rule, bare=bare).errors
    assert str(problem) == (
        "model.layers.0.input_layernorm: v_proj come from 'bare', which holds no such norm, so "
        "nothing tells whether scales were folded into it; take them from a checkpoint that holds "
        "its norms, or set trust_sources: true"
    )
    assert not mix(rule, bare=bare, head="trust_sources: true\n").errors


def test_unknown_family_takes_the_whole_block_or_is_an_error(tmp_path: Path) -> None:
    model = slice_checkpoint(tmp_path / "model", "bf16", model_type="brand_new")
    awq = slice_checkpoint(tmp_path / "awq", "autoawq-g64", model_type="brand_new")
    whole = 'match: "*_proj", method: awq, group_size: 64, source: awq'
    plan = mixed_plan(model, whole, awq=awq)
    assert not plan.errors
    assert {layer.source for layer in plan.layers} == {"awq"}
    plan = mixed_plan(model, V_OF_AWQ, awq=awq)
    (problem,) = plan.errors
    assert str(problem) == (
        "model.layers.0.input_layernorm, model.layers.0.post_attention_layernorm: no norm is right "
        "for both down_proj, gate_proj, up_proj, k_proj of 'model' and v_proj of 'awq': they are "
        "stored behind their own, which differ by up to 9.8x; it is not known which of them read "
        "it; take all of them from one source"
    )


def test_norm_with_a_bias_is_rescaled_only_where_its_bias_changes_alike(tmp_path: Path) -> None:
    norm = slice_tensors("bf16")[f"{INPUT_NORM}.weight"]
    folded = slice_tensors("autoawq-g64")[f"{INPUT_NORM}.weight"]
    bias = torch.linspace(-1, 1, 576)
    model = slice_checkpoint(tmp_path / "model", "bf16", {f"{INPUT_NORM}.bias": bias.bfloat16()})
    alike = {f"{INPUT_NORM}.bias": bias.bfloat16().float() * folded / norm.float()}
    awq = slice_checkpoint(tmp_path / "awq", "autoawq-g64", alike)
    plan = mixed_plan(model, V_OF_AWQ, awq=awq)
    assert not plan.errors
    assert decided(plan, f"{ATTENTION}k_proj") == ("model", "cast", "awq")
    other = slice_checkpoint(tmp_path / "other", "autoawq-g64", {f"{INPUT_NORM}.bias": bias})
    plan = mixed_plan(model, V_OF_AWQ.replace("source: awq", "source: other"), other=other)
    (problem,) = plan.errors
    assert str(problem) == (
        "model.layers.0.input_layernorm: differs between 'other' and 'model', and k_proj cannot be "
        "rescaled: its bias does not change as its weight does; take all of its consumers from "
        "'other' or all from 'model'"
    )


def test_feature_that_only_one_norm_drops_cannot_be_rescaled(mix: Mix, tmp_path: Path) -> None:
    folded = slice_tensors("autoawq-g64")[f"{INPUT_NORM}.weight"].clone()
    folded[5] = 0
    other = slice_checkpoint(tmp_path / "other", "autoawq-g64", {f"{INPUT_NORM}.weight": folded})
    plan = mix(V_OF_AWQ.replace("source: awq", "source: other"), other=other)
    (problem,) = plan.errors
    assert "k_proj cannot be rescaled: one of its weights is zero in only one of" in str(problem)


def test_gemmas_norms_are_compared_and_rescaled_by_one_plus_w(tmp_path: Path) -> None:
    model = slice_checkpoint(tmp_path / "model", "bf16", model_type="gemma")
    awq = slice_checkpoint(tmp_path / "awq", "autoawq-g64", model_type="gemma")
    plan = mixed_plan(model, V_OF_AWQ, awq=awq)
    rescale = plan.by_name[f"{ATTENTION}k_proj"].rescale
    assert rescale is not None
    assert rescale.offset == 1.0


def test_plan_says_what_is_rescaled_and_where_norms_come_from(mix: Mix) -> None:
    plan = mix(V_OF_AWQ)
    lines = "\n".join(summary_lines(plan))
    assert f"{INPUT_NORM}  -  awq  as stored (follows its consumers)" in lines
    assert "k_proj  as stored (bf16)  model  cast (rescaled to the norm of awq)" in lines
    layers = {
        entry["name"]: entry for entry in json.loads(json.dumps(plan_as_dict(plan)))["layers"]
    }
    assert layers[INPUT_NORM]["source"] == "awq"
    assert layers[f"{ATTENTION}k_proj"]["rescaled"] == {
        "norm": f"{INPUT_NORM}.weight", "times": "model", "over": "awq", "offset": 0.0
    }  # fmt: skip
    assert layers[f"{MLP}up_proj"]["rescaled"] is None


def test_plan_of_several_sources_needs_no_torch_where_no_pair_is_torn(tmp_path: Path) -> None:
    model = slice_checkpoint(tmp_path / "model", "bf16")
    awq = slice_checkpoint(tmp_path / "awq", "autoawq-g64")
    head = f"sources:\n  awq: {{path: {awq}}}\n"
    preset = write_preset(tmp_path / "presets", V_OF_AWQ, head=head)
    run_without_torch("plan", "--model", model, "--preset", preset, "--device", "cpu")
