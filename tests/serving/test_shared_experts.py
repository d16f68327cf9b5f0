"""Shared experts are layers of their own, where SGLang by itself would fuse them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.families.architectures import find
from benchmarks.families.checkpoints import make_checkpoint
from tests.presets import write_preset

LoadModel = Callable[..., Any]

pytestmark = [
    pytest.mark.usefixtures("sglang_context"),
    # what SGLang's models say to SGLang when they are imported
    pytest.mark.filterwarnings("ignore:MultiPlatformOp:DeprecationWarning"),
]


def test_experts_of_a_model_that_fuses_them_stay_apart(
    load_model: LoadModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.layers.moe.utils import resolve_shared_experts_config
    from sglang.srt.models.glm4_moe import Glm4MoeForCausalLM

    # as on a GPU of compute capability 8.0 or more
    monkeypatch.setattr(Glm4MoeForCausalLM, "shared_experts_fusion_disable_reason", lambda *_: None)
    path = make_checkpoint(find("GLM-4-MoE"), tmp_path)
    preset = write_preset(
        tmp_path,
        'match: "*.experts.*", method: awq',
        'match: "*.shared_experts.*", method: fp8_block',
    )
    model = load_model(path, preset)
    assert (
        resolve_shared_experts_config(
            Glm4MoeForCausalLM, model.config, None
        ).num_fused_shared_experts
        == 1
    )
    block = model.get_submodule("model.layers.1.mlp")
    assert block.num_fused_shared_experts == 0
    assert block.experts.num_experts == 8
    assert type(block.experts.quant_method).__name__ == "AWQMoEMethod"
    assert type(block.shared_experts.down_proj.quant_method).__name__ == "Fp8LinearMethod"
