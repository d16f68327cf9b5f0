"""Scales of the KV cache on disk: the source's that the preset names, kept and found again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.plan.kv_cache import kv_cache_line
from mixedprec_plugin.plan.resolve import resolve_plan
from mixedprec_plugin.preset.load import preset_for
from tests.commands import converted
from tests.plan.test_kv_cache import SPELLINGS, expected, write
from tests.presets import write_preset


@pytest.mark.parametrize("writer", SPELLINGS)
@pytest.mark.parametrize("said", ["", "scales: other"])
def test_scales_are_kept_and_found_again(tmp_path: Path, writer: str, said: str) -> None:
    model = write(tmp_path / "model", writer, 1)
    other = write(tmp_path / "other", writer, 10)
    head = (
        f"sources: {{other: {{path: {json.dumps(str(other))}}}}}\n"
        f"kv_cache: {{dtype: fp8_e4m3, {said}}}\n"
    )
    rules = ('match: "*_proj", method: fp8', 'match: "*.0.mlp.*", method: bf16, source: other')
    out = converted(model, write_preset(tmp_path, *rules, head=head), tmp_path / "out")
    held = {
        name: float(tensor)
        for file in out.glob("*.safetensors")
        for name, tensor in load_file(file).items()
        if name.endswith(("k_scale", "v_scale", "output_scale"))
    }
    assert held == expected(writer, 10 if said else 1)
    source = open_source(out)
    plan = resolve_plan(preset_for("", source, (), "preset"), source, Target())
    assert not plan.errors
    line = "KV cache in fp8_e4m3, scales of 3 attention layers from model"
    assert kv_cache_line(plan) == line
