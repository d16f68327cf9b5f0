"""What can be checked of benchmarks/third_party without its tools."""

from __future__ import annotations

import re

import pytest
import torch

from benchmarks.third_party.calibration import calibration_windows
from benchmarks.third_party.environments import REQUIREMENTS
from benchmarks.third_party.folding import unfold
from benchmarks.third_party.recipes import RECIPES

LAYER = "model.layers.0"
TOOLS = {recipe.tool.name: recipe.tool for recipe in RECIPES.values()}


class Words:
    """A tokenizer with a token for every character."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": list(range(len(text)))}


def base_layer() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "input_layernorm": (8,),
        "post_attention_layernorm": (8,),
        "self_attn.q_proj": (8, 8),
        "self_attn.k_proj": (4, 8),
        "self_attn.v_proj": (4, 8),
        "self_attn.o_proj": (8, 8),
        "mlp.gate_proj": (16, 8),
        "mlp.up_proj": (16, 8),
        "mlp.down_proj": (8, 16),
    }
    return {
        f"{LAYER}.{name}.weight": torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }


def test_unfold_gives_back_what_awq_folded() -> None:
    base = base_layer()
    folded = dict(base)
    inputs, hidden = torch.linspace(0.5, 4, 8), torch.linspace(0.25, 3, 16)
    for norm, consumers in (
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ):
        folded[f"{LAYER}.{norm}.weight"] = base[f"{LAYER}.{norm}.weight"] / inputs
        for name in consumers:
            folded[f"{LAYER}.{name}.weight"] = base[f"{LAYER}.{name}.weight"] * inputs
    folded[f"{LAYER}.mlp.up_proj.weight"] = folded[f"{LAYER}.mlp.up_proj.weight"] / hidden[:, None]
    folded[f"{LAYER}.mlp.down_proj.weight"] = base[f"{LAYER}.mlp.down_proj.weight"] * hidden
    plain = unfold(folded, base)
    assert plain.keys() == base.keys()
    for name, tensor in base.items():
        torch.testing.assert_close(plain[name], tensor)


def test_windows_span_the_whole_prose() -> None:
    windows = calibration_windows(Words(), 24, 256)
    assert [len(window) for window in windows] == [256] * 24
    assert windows[0][0] == 0
    with pytest.raises(ValueError, match=r"prose\.txt: \d+ tokens \(expected 1000000 or more\)"):
        calibration_windows(Words(), 1, 1_000_000)


@pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)
def test_each_tool_has_scripts_and_exact_requirements(tool) -> None:
    for verb in ("quantize", "dequantize"):
        assert (REQUIREMENTS.parent / f"{verb}_{tool.script}.py").is_file()
    lines = (REQUIREMENTS / f"{tool.name}.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith(f"{tool.name}==")
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+", line) for line in lines)
