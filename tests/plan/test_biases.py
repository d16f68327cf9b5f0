from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixedprec_plugin.compose.stream import VirtualCheckpoint
from tests.plan.mixtures import ATTENTION, mixed_plan, slice_checkpoint

NAME = f"{ATTENTION}v_proj"
BIAS = f"{NAME}.bias"
RULE = 'match: "*.v_proj", method: bf16, source: other'
ONES, ZEROS = torch.ones(192), torch.zeros(192)


@pytest.mark.parametrize("method", ["bf16", "gptq, group_size: 64"])
def test_zero_bias_that_the_model_has_not_is_left_out(tmp_path: Path, method: str) -> None:
    model = slice_checkpoint(tmp_path / "model", "bf16")
    other = slice_checkpoint(tmp_path / "other", "bf16", {BIAS: ZEROS.half()})
    plan = mixed_plan(model, RULE.replace("bf16", method), other=other)
    assert not plan.errors
    layer = plan.by_name[NAME]
    assert layer.note == "without its zero bias"
    without = mixed_plan(model, RULE.replace("bf16", method), other=model).by_name[NAME]
    assert (layer.bytes_before, layer.bytes_after) == (without.bytes_before, without.bytes_after)
    assert BIAS not in dict(iter(VirtualCheckpoint(plan)))


def test_bias_that_the_model_has_not_is_an_error(tmp_path: Path) -> None:
    model = slice_checkpoint(tmp_path / "model", "bf16")
    other = slice_checkpoint(tmp_path / "other", "bf16", {BIAS: ONES})
    (problem,) = mixed_plan(model, RULE, other=other).errors
    assert str(problem) == (
        f"{NAME}: has a bias in 'other' that is not zero, and none in 'model'; take it from "
        "another source"
    )


def test_zero_bias_that_the_source_lacks_is_the_models(tmp_path: Path) -> None:
    model = slice_checkpoint(tmp_path / "model", "bf16", {BIAS: ZEROS})
    other = slice_checkpoint(tmp_path / "other", "bf16")
    plan = mixed_plan(model, RULE, other=other)
    assert not plan.errors
    layer = plan.by_name[NAME]
    assert (layer.source, layer.note) == ("other", "with the model's zero bias")
    assert layer.bytes_after == 2 * 192 * 576 + 2 * 192
    assert torch.equal(dict(iter(VirtualCheckpoint(plan)))[BIAS], ZEROS.bfloat16())


def test_bias_that_the_source_lacks_is_an_error(tmp_path: Path) -> None:
    model = slice_checkpoint(tmp_path / "model", "bf16", {BIAS: ONES})
    other = slice_checkpoint(tmp_path / "other", "bf16")
    (problem,) = mixed_plan(model, RULE, other=other).errors
    assert "has a bias in 'model' that is not zero, and none in 'other'" in str(problem)


def test_bias_that_both_have_is_the_sources(tmp_path: Path) -> None:
    model = slice_checkpoint(tmp_path / "model", "bf16", {BIAS: ZEROS})
    other = slice_checkpoint(tmp_path / "other", "bf16", {BIAS: ONES})
    plan = mixed_plan(model, RULE, other=other)
    assert not plan.problems
    assert torch.equal(dict(iter(VirtualCheckpoint(plan)))[BIAS], ONES.bfloat16())
