"""A checkpoint in NVFP4 and FP8 as ModelOpt writes it, loaded on the CPU platform."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.compose.test_nvfp4_experts import write_mixed
from tests.presets import write_preset
from tests.tensors import as_integers

pytestmark = pytest.mark.usefixtures("sglang_context")


@pytest.mark.parametrize("is_kept", [True, False])
def test_experts_are_loaded_with_and_without_their_input_scales(
    load_model: Callable[..., Any], tmp_path: Path, is_kept: bool
) -> None:
    """Layers that no rule matches are served as they are stored, input scales and all."""
    mixed, _ = write_mixed(tmp_path)
    rule = 'match: "*.no_such.*", optional: true' if is_kept else 'match: "*.experts.*"'
    served = load_model(mixed, write_preset(tmp_path, f"{rule}, method: nvfp4"))
    experts = served.model.layers[1].block_sparse_moe.experts
    assert type(experts.quant_method).__name__ == "ModelOptNvFp4FusedMoEMethod"
    stored = load_file(mixed / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.2"
    up = stored[f"{name}.w3.weight_scale"]
    half = experts.w13_weight_scale.shape[1] // 2
    assert torch.equal(as_integers(experts.w13_weight_scale[2, half:]), as_integers(up))
    assert torch.equal(experts.w2_weight[2], stored[f"{name}.w2.weight"])
    assert experts.w2_weight_scale_2[2] == stored[f"{name}.w2.weight_scale_2"]
    assert hasattr(experts, "w13_input_scale") == is_kept
    if is_kept:
        assert bool((experts.w13_input_scale == stored[f"{name}.w1.input_scale"]).all())
