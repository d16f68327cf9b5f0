"""`--format compressed-tensors` against that library and against what llm-compressor wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mixedprec_plugin.methods.interface import Target
from tests.checkpoint.peers import peer_checkpoint, quantization_config
from tests.checkpoints import write_llama
from tests.commands import convert, converted
from tests.convert.folders import tensors
from tests.presets import EXPORTED, open_virtual_checkpoint, write_preset
from tests.quantize.peers import FILE, LAYERS, PEERS
from tests.tensors import same_bytes

AS = ("--format", "compressed-tensors")


def exported(model: Path, preset: Path, out: Path) -> Path:
    return converted(model, preset, out, *AS)


def said(out: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((out / "config.json").read_text())
    quantization: dict[str, Any] = config["quantization_config"]
    return quantization


@pytest.mark.slow
def test_library_decompresses_to_the_values_of_the_plan(tmp_path: Path) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    model = write_llama(tmp_path / "model")
    one_group = 'match: "*.2.self_attn.o_proj", method: awq, group_size: -1'
    preset = write_preset(tmp_path, *EXPORTED, one_group)
    exported(model, preset, tmp_path / "out")
    plain = write_preset(tmp_path / "plain", 'match: "*", method: unquantized')
    converted(model, preset, tmp_path / "mixed")
    target = Target(device="cpu")
    expected = dict(iter(open_virtual_checkpoint(tmp_path / "mixed", plain, target)))
    written = tensors(tmp_path / "out")
    config = QuantizationConfig.model_validate(said(tmp_path / "out"))
    assert config.format == "mixed-precision"
    seen = set()
    for group in config.config_groups.values():
        assert group.format is not None
        compressor = BaseCompressor.get_value_from_registry(group.format)
        for name in [t for t in group.targets if f"{t}.weight_scale" in written]:
            own = {s.removeprefix(f"{name}."): t for s, t in written.items() if s.startswith(name)}
            weight = compressor.decompress(own, group)["weight"]
            assert torch.equal(weight.to(torch.bfloat16), expected[f"{name}.weight"]), name
            seen.add(name)
    assert len(seen) == 3 * 7 - 4
    rest = {name for name in written if name.rpartition(".")[0] not in seen}
    assert rest == {name for name in expected if name.rpartition(".")[0] not in seen}
    assert all(same_bytes(written[name], expected[name]) for name in rest)


def test_every_layer_is_a_target_or_ignored_once(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model", tie_word_embeddings=False)
    exported(model, write_preset(tmp_path, *EXPORTED), tmp_path / "out")
    config = said(tmp_path / "out")
    listed = [t for group in config["config_groups"].values() for t in group["targets"]]
    listed += config["ignore"]
    assert len(listed) == len(set(listed))
    attention = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj")
    mlp = ("gate_proj", "up_proj", "down_proj", "gate_up_proj")
    ends = [f"self_attn.{name}" for name in attention] + [f"mlp.{name}" for name in mlp]
    blocks = {f"model.layers.{n}.{end}" for n in range(3) for end in ends}
    assert set(listed) == blocks | {"lm_head", "Linear"}
    assert "model.layers.1.self_attn.qkv_proj" in config["ignore"]


@pytest.mark.parametrize(
    ("tool", "rule"),
    [
        ("llmcompressor-w4a16-g64", "method: gptq, group_size: 64"),
        ("llmcompressor-w4a16-g64", "method: humming, bits: 4, group_size: 64"),
        ("llmcompressor-w4a16-asym-g64", "method: awq, group_size: 64"),
        ("llmcompressor-fp8-dynamic", "method: fp8_channel"),
        ("llmcompressor-w8a8-int8", "method: int8_channel"),
        ("compressedtensors-nvfp4", "method: nvfp4"),
    ],
)
def test_layer_comes_back_as_llm_compressor_wrote_it(tmp_path: Path, tool: str, rule: str) -> None:
    model = peer_checkpoint(tmp_path / "model", tool)
    preset = write_preset(tmp_path, f'match: "*_proj", {rule}')
    exported(model, preset, tmp_path / "out")
    theirs, ours = load_file(PEERS / tool / FILE), tensors(tmp_path / "out")
    for layer in LAYERS:
        own = {name: t for name, t in theirs.items() if name.startswith(f"{layer}.")}
        assert {name for name in ours if name.startswith(f"{layer}.")} == own.keys()
        for name, tensor in own.items():
            assert same_bytes(ours[name], tensor.to(ours[name].dtype)), name
    assert_same_group(said(tmp_path / "out"), tool)


def assert_same_group(config: dict[str, Any], tool: str) -> None:
    """Hold the one group of a config against what the tool wrote, as far as we write it."""
    (group,) = config["config_groups"].values()
    (written,) = quantization_config(tool)["config_groups"].values()
    assert group["format"] == written["format"] == config["format"]
    for part in ("weights", "input_activations"):
        expected = written[part]
        assert group[part] == (expected and {key: expected[key] for key in group[part]})


def test_blocks_are_described_as_llm_compressor_does(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model")
    preset = write_preset(tmp_path, 'match: "*", method: fp8_block')
    exported(model, preset, tmp_path / "out")
    assert_same_group(said(tmp_path / "out"), "llmcompressor-fp8-block")


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            'match: "*.mlp.*", method: int8',
            "model.layers.0-2.mlp.down_proj, model.layers.0-2.mlp.gate_proj, "
            "model.layers.0-2.mlp.up_proj: int8 cannot be written: SGLang reads no INT8 in blocks",
        ),
        (
            'match: "*.0.mlp.down_proj", method: humming_int5',
            "model.layers.0.mlp.down_proj: humming_int5 cannot be written: SGLang reads no "
            "integers of 5 bits there",
        ),
    ],
)
def test_layers_that_cannot_be_written_are_named(tmp_path: Path, rule: str, message: str) -> None:
    model = write_llama(tmp_path / "model")
    code, _, err = convert(model, write_preset(tmp_path, rule), tmp_path / "out", *AS)
    assert code == 1
    assert message in err
    assert "give it another method, or leave out --format compressed-tensors" in err
    assert not (tmp_path / "out").exists()


def test_auto_cannot_be_written_whatever_is_stored(tmp_path: Path) -> None:
    model = peer_checkpoint(tmp_path / "model", "llmcompressor-w4a16-g64")
    preset = write_preset(tmp_path, 'match: "*_proj", method: auto')
    code, _, err = convert(model, preset, tmp_path / "out", *AS, device="cuda")
    assert code == 1
    assert "auto (auto) has no counterpart there; give it another method, or leave out" in err


def test_act_order_cannot_be_written(tmp_path: Path) -> None:
    model = peer_checkpoint(tmp_path / "model", "gptqmodel-gptq-g64", desc_act=True)
    preset = write_preset(tmp_path, 'match: "*_proj", method: gptq, group_size: 64')
    code, _, err = convert(model, preset, tmp_path / "out", *AS)
    assert code == 1
    assert "gptq cannot be written: its groups are in act order" in err
