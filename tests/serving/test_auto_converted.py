"""Converted layers under `method: auto`: each gets SGLang's own config of where it came from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.plan.resolve import resolve_plan
from mixedprec_plugin.preset.load import preset_for
from tests.checkpoint.peers import quantization_config
from tests.checkpoints import write_checkpoint
from tests.commands import converted
from tests.presets import write_preset
from tests.quantize.peers import LAYERS, torch_layer


def _two_layers(path: Path, peer: str) -> Path:
    tensors = {
        f"model.layers.{index}.self_attn.o_proj.{suffix}": tensor.clone()
        for index in (0, 1)
        for suffix, tensor in torch_layer(peer, LAYERS[0]).items()
    }
    config: dict[str, Any] = {"architectures": ["SliceOfALlama"], "torch_dtype": "bfloat16"}
    config["quantization_config"] = quantization_config(peer)
    return write_checkpoint(path, config, tensors)


def test_each_layer_gets_the_scheme_that_its_source_had(
    sglang_context: SimpleNamespace, tmp_path: Path
) -> None:
    from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )

    from mixedprec_plugin.serving.config import MixedPrecisionConfig

    model = _two_layers(tmp_path / "model", "llmcompressor-w8a8-int8")
    other = _two_layers(tmp_path / "other", "llmcompressor-fp8-dynamic")
    preset = write_preset(
        tmp_path, 'match: "*_proj", method: auto', 'match: "*.1.*", method: auto, source: other',
        head=f"trust_sources: true\nsources:\n  other: {{path: {other}}}\n",
    )  # fmt: skip
    source = open_source(converted(model, preset, tmp_path / "out", device="cuda"))
    plan = resolve_plan(preset_for("", source, (), "preset"), source, Target())
    config = MixedPrecisionConfig(plan)
    found = [
        config._child_under_auto(plan.by_name[f"model.layers.{index}.self_attn.o_proj"])
        for index in (0, 1)
    ]
    types = []
    for child in found:
        assert isinstance(child, CompressedTensorsConfig)
        types.append(child.target_scheme_map["Linear"]["weights"].type)
    assert types == ["int", "float"]
