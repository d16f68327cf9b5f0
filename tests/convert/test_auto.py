"""Converting layers that run by another checkpoint's own `quantization_config`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.compose.stream import VirtualCheckpoint
from mixedprec_plugin.methods.interface import Device, Target
from mixedprec_plugin.plan.model import Plan
from mixedprec_plugin.plan.resolve import resolve_plan
from mixedprec_plugin.preset.load import preset_for
from tests.checkpoint.peers import FOLDERS, peer_checkpoint, quantization_config
from tests.checkpoints import write_checkpoint
from tests.commands import convert, converted
from tests.plan.test_auto import NO_CLASS
from tests.presets import open_virtual_checkpoint, write_preset
from tests.quantize.peers import LAYERS, torch_layer
from tests.tensors import same_bytes

# what no class of SGLang reads is refused
CASES = [
    (folder, device)
    for folder in FOLDERS
    for device in ("cuda", "cpu")
    if device == "cpu" or folder not in NO_CLASS
]
AUTO = 'match: "*_proj", method: auto'


def _reopened(folder: Path, device: Device = "cuda") -> Plan:
    """The plan of a converted checkpoint by the preset that it carries."""
    source = open_source(folder)
    return resolve_plan(preset_for("", source, (), "preset"), source, Target(device=device))


@pytest.mark.parametrize(("folder", "device"), CASES)
def test_converted_layers_are_what_their_source_stores_and_says(
    tmp_path: Path, folder: str, device: Device
) -> None:
    model, preset = peer_checkpoint(tmp_path / "model", folder), write_preset(tmp_path, AUTO)
    converted(model, preset, tmp_path / "out", device=device)
    before = dict(iter(open_virtual_checkpoint(model, preset, Target(device=device))))
    plan = _reopened(tmp_path / "out", device)
    assert not plan.errors
    after = dict(iter(VirtualCheckpoint(plan)))
    assert after.keys() == before.keys()
    assert all(same_bytes(after[name], tensor) for name, tensor in before.items())
    for name in LAYERS:
        method = plan.by_name[name].method
        said = plan.source.quantization_config_of(name)
        theirs = {k: v for k, v in quantization_config(folder).items() if v is not None}
        assert said == ({} if method == "bf16" else theirs)
        if device == "cuda":
            assert method == ("bf16" if folder == "bf16" else "auto")


def _two_layers(path: Path, peer: str, **changes: Any) -> Path:
    """A checkpoint of two layers, both the peer's k_proj."""
    tensors = {
        f"model.layers.{index}.self_attn.o_proj.{suffix}": tensor.clone()
        for index in (0, 1)
        for suffix, tensor in torch_layer(peer, LAYERS[0]).items()
    }
    config: dict[str, Any] = {"architectures": ["SliceOfALlama"], "torch_dtype": "bfloat16"}
    config["quantization_config"] = {**quantization_config(peer), **changes}
    return write_checkpoint(path, config, tensors)


def test_each_layer_keeps_the_config_of_its_own_source(tmp_path: Path) -> None:
    model = _two_layers(tmp_path / "model", "llmcompressor-w8a8-int8")
    other = _two_layers(tmp_path / "other", "autoround-gptq-g64")
    preset = write_preset(
        tmp_path, AUTO, 'match: "*.1.*", method: auto, source: other',
        head=f"trust_sources: true\nsources:\n  other: {{path: {other}}}\n",
    )  # fmt: skip
    converted(model, preset, tmp_path / "out", device="cuda")
    plan = _reopened(tmp_path / "out")
    assert not plan.errors
    for index, peer in ((0, "llmcompressor-w8a8-int8"), (1, "autoround-gptq-g64")):
        name = f"model.layers.{index}.self_attn.o_proj"
        assert plan.by_name[name].method == "auto"
        assert plan.source.quantization_config_of(name) == quantization_config(peer)


def test_a_layer_that_its_source_ignores_by_number_is_told_from_the_others(tmp_path: Path) -> None:
    """Layers that are alike share their format, unless config.json tells them apart."""
    model = _two_layers(tmp_path / "model", "llmcompressor-w8a8-int8")
    out = tmp_path / "out"
    converted(model, write_preset(tmp_path, AUTO), out, device="cuda")
    config = json.loads((out / "config.json").read_text())
    (entry,) = config["quantization_config"]["layers"]
    entry["config"]["ignore"] = ["model.layers.1.self_attn.o_proj"]
    (out / "config.json").write_text(json.dumps(config))
    texts = [str(problem) for problem in _reopened(out).errors]
    assert len(texts) == 1
    assert texts[0].startswith("model.layers.1.self_attn.o_proj: is stored as int8 per channel")
    assert "config.json leaves it unquantized, which method: auto would go by" in texts[0]


def test_what_another_source_says_is_one_of_a_conversions_inputs(tmp_path: Path) -> None:
    model = _two_layers(tmp_path / "model", "llmcompressor-w8a8-int8")
    other = _two_layers(tmp_path / "other", "autoround-gptq-g64")
    preset = write_preset(
        tmp_path, 'match: "*", method: auto, source: other',
        head=f"trust_sources: true\nsources:\n  other: {{path: {other}}}\n",
    )  # fmt: skip
    converted(model, preset, tmp_path / "out", device="cuda")
    converted(model, preset, tmp_path / "out", device="cuda")
    _two_layers(other, "autoround-gptq-g64", autoround_version="0.0")
    code, _, errors = convert(model, preset, tmp_path / "out", device="cuda")
    assert code != 0
    assert "config.json" in errors
