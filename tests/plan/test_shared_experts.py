"""What the plan says of shared experts that SGLang by itself would fuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixedprec_plugin.plan.render import summary_lines
from tests import published
from tests.presets import plan

RULES = ('match: "*.mlp.experts.*", method: fp8_block',)


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        (published.deepseek_v3(num_layers=5), "3-4"),
        (published.glm_4_5_air(num_layers=4), "1-3"),
    ],
    ids=["DeepSeek-V3", "GLM-4.5-Air"],
)
def test_plan_says_that_shared_experts_are_not_fused(
    tmp_path: Path, model: published.Published, layers: str
) -> None:
    made = plan(model.write(tmp_path / "model"), *RULES)
    (line,) = [x for x in summary_lines(made) if "not fused" in x]
    assert line.startswith(f"mixedprec: model.layers.{layers}.mlp.shared_experts.")
    assert line.endswith("not fused into the routed experts, they follow their own rules")


@pytest.mark.parametrize(
    "model", [published.kimi_k2(num_layers=3), published.qwen3_30b_a3b(num_layers=2)]
)
def test_plan_is_silent_where_sglang_fuses_none_either(
    tmp_path: Path, model: published.Published
) -> None:
    made = plan(model.write(tmp_path / "model"), *RULES)
    assert not any("not fused" in line for line in summary_lines(made))
