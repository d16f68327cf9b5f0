"""Experts in MXFP4 as compressed-tensors writes them, loaded on the CPU platform."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.compose.test_mxfp4_experts import EXPERT, write_mixed
from tests.presets import write_preset

pytestmark = pytest.mark.usefixtures("sglang_context")


def test_what_is_stored_arrives_in_sglangs_parameters(
    load_model: Callable[..., Any], tmp_path: Path
) -> None:
    mixed, _ = write_mixed(tmp_path)
    rules = write_preset(tmp_path, 'match: "*.experts.*", method: mxfp4')
    experts = load_model(mixed, rules).model.layers[1].block_sparse_moe.experts
    assert type(experts.quant_method).__name__ == "Mxfp4MoEMethod"
    stored = load_file(mixed / "model.safetensors")
    name = EXPERT.removesuffix(".w1")
    half = experts.w13_weight.shape[1] // 2
    for suffix, held in (("weight_packed", "weight"), ("weight_scale", "weight_scale")):
        w13, w2 = getattr(experts, f"w13_{held}")[2], getattr(experts, f"w2_{held}")[2]
        assert torch.equal(w13[:half], stored[f"{name}.w1.{suffix}"])
        assert torch.equal(w13[half:], stored[f"{name}.w3.{suffix}"])
        assert torch.equal(w2, stored[f"{name}.w2.{suffix}"])
    assert not hasattr(experts, "w13_weight_bias")
