from __future__ import annotations

import importlib.util
import io
from pathlib import Path

import pytest

from mixedprec_plugin.families.names import sglang_name
from mixedprec_plugin.families.table import family_of
from mixedprec_plugin.plan.render import plan_as_dict, print_plan
from mixedprec_plugin.plan.tables import Page
from tests import published
from tests.presets import plan

QWEN_VL = "Qwen2_5_VLForConditionalGeneration"
GEMMA = "Gemma3ForConditionalGeneration"


@pytest.mark.parametrize(
    ("architecture", "module", "expected"),
    [
        ("LlamaForCausalLM", "model.layers.0.mlp.down_proj", "model.layers.0.mlp.down_proj"),
        ("MixtralForCausalLM", "model.layers.0.self_attn.qkv_proj", "layers.0.self_attn.qkv_proj"),
        ("MixtralForCausalLM", "model.norm", "model.norm"),
        (QWEN_VL, "model.layers.0.mlp.down_proj", "model.layers.0.mlp.down_proj"),
        (QWEN_VL, "model.language_model.layers.0.mlp.down_proj", "model.layers.0.mlp.down_proj"),
        (QWEN_VL, "visual.blocks.3.attn.qkv", "visual.blocks.3.attn.qkv_proj"),
        (QWEN_VL, "model.visual.blocks.3.attn.qkv", "visual.blocks.3.attn.qkv_proj"),
        (
            GEMMA,
            "language_model.model.layers.0.mlp.down_proj",
            "language_model.model.layers.0.mlp.down_proj",
        ),
        (
            GEMMA,
            "vision_tower.vision_model.encoder.layers.0.self_attn.out_proj",
            "vision_tower.vision_model.encoder.layers.0.self_attn.proj",
        ),
    ],
)
def test_module_is_named_as_sglang_does(architecture: str, module: str, expected: str) -> None:
    assert sglang_name(module, family_of({"architectures": [architecture]})) == expected


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("models/mixtral.py", 'prefix="layers"'),
        ("models/qwen2_5_vl.py", '"attn.qkv": "attn.qkv_proj"'),
        ("models/qwen2_5_vl.py", 'prefix=add_prefix("visual", prefix)'),
        ("models/qwen2_5_vl.py", 'prefix=add_prefix("model", prefix)'),
        ("models/gemma3_mm.py", 'prefix=add_prefix("language_model", prefix)'),
        ("models/gemma3_mm.py", 'name.replace(".self_attn.out_proj", ".self_attn.proj")'),
        ("layers/attention/vision.py", 'prefix=add_prefix("proj", prefix)'),
    ],
)
def test_installed_sglang_still_says_so(file: str, text: str) -> None:
    spec = importlib.util.find_spec("sglang")
    assert spec is not None
    assert spec.origin is not None
    assert text in (Path(spec.origin).parent / "srt" / file).read_text(encoding="utf-8")


def test_plan_shows_both_names_where_they_differ(tmp_path: Path) -> None:
    model = published.mixtral_8x7b(num_layers=2).write(tmp_path / "model")
    made = plan(model, 'match: "*.self_attn.*", method: fp8_block')
    out = io.StringIO()
    print_plan(made, Page(out))
    lines = [line.strip() for line in out.getvalue().splitlines()]
    row = next(i for i, line in enumerate(lines) if line.startswith("model.layers.0-1.self_attn.q"))
    assert lines[row + 1] == "SGLang: layers.0-1.self_attn.qkv_proj"
    assert not any("SGLang: layers.0-1.input_layernorm" in line for line in lines)
    layers = {layer["name"]: layer for layer in plan_as_dict(made)["layers"]}
    expert = layers["model.layers.1.block_sparse_moe.experts.7.w2"]
    assert expert["module"] == "model.layers.1.block_sparse_moe.experts"
    assert expert["sglang_module"] == "layers.1.block_sparse_moe.experts"


def test_plan_shows_one_name_where_they_do_not_differ(tmp_path: Path) -> None:
    model = published.qwen3_30b_a3b(num_layers=1).write(tmp_path / "model")
    out = io.StringIO()
    print_plan(plan(model, 'match: "*", method: gptq'), Page(out))
    assert "SGLang:" not in out.getvalue()
