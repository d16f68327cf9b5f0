"""`mixedprec convert` from the command line to the files, read back by others."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.compose.stream import VirtualCheckpoint
from mixedprec_plugin.methods.gptq import codec as gptq
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.plan.resolve import resolve_plan
from mixedprec_plugin.preset.load import preset_for
from tests.checkpoints import llama_config, llama_tensors, write_checkpoint
from tests.commands import convert, run
from tests.convert.folders import contents, tensors
from tests.presets import open_virtual_checkpoint, write_preset
from tests.tensors import same_bytes

CPU = Target(device="cpu")


@pytest.mark.parametrize("size", ["5GB", "300KB", "1B"])
def test_files_hold_what_the_virtual_checkpoint_yields(
    model: Path, preset: Path, tmp_path: Path, size: str
) -> None:
    code, text, _ = convert(model, preset, tmp_path / "out", "--max-shard-size", size)
    assert code == 0
    stream = dict(iter(open_virtual_checkpoint(model, preset, CPU)))
    written = tensors(tmp_path / "out")
    assert written.keys() == stream.keys()
    assert all(same_bytes(written[name], tensor) for name, tensor in stream.items())
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert f"in {len(files)} file" in text
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == (len(files) > 1)


def test_no_part_is_larger_than_asked_unless_one_layer_is(
    model: Path, preset: Path, tmp_path: Path
) -> None:
    convert(model, preset, tmp_path / "out", "--max-shard-size", "150KB")
    source = open_source(tmp_path / "out")
    for path in (tmp_path / "out").glob("*.safetensors"):
        layers = {t.name.rpartition(".")[0] for t in source.tensors.values() if t.path == path}
        size = sum(t.num_bytes for t in source.tensors.values() if t.path == path)
        assert size <= 150_000 or len(layers) == 1


def test_every_tensor_is_aligned_to_its_elements(model: Path, preset: Path, tmp_path: Path) -> None:
    convert(model, preset, tmp_path / "out")
    sizes = {"F32": 4, "I32": 4, "BF16": 2, "I8": 1, "F8_E4M3": 1}
    for tensor in open_source(tmp_path / "out").tensors.values():
        assert tensor.start % sizes[tensor.dtype] == 0, tensor
    path = tmp_path / "out" / "model.safetensors"
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_files_that_say_nothing_of_weights_are_copied(
    model: Path, preset: Path, tmp_path: Path
) -> None:
    convert(model, preset, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "tokenizer.json", "model.safetensors", "mixedprec_provenance.json"
    }  # fmt: skip


def test_converted_checkpoint_plans_without_a_preset_and_takes_all_as_stored(
    model: Path, preset: Path, tmp_path: Path
) -> None:
    convert(model, preset, tmp_path / "out")
    before = resolve_plan(preset_for(str(preset), open_source(model), (), ""), open_source(model),
                          CPU)  # fmt: skip
    source = open_source(tmp_path / "out")
    after = resolve_plan(preset_for("", source, (), ""), source, CPU)
    assert after.problems == before.problems == ()
    assert {layer.action for layer in after.layers} == {"as stored"}
    for name, layer in before.by_name.items():
        same = after.by_name[name]
        assert (same.method, dict(same.outputs)) == (layer.method, dict(layer.outputs))
        assert (same.scheme is None) or same.scheme.identity == layer.scheme.identity
    stream, direct = dict(iter(VirtualCheckpoint(after))), dict(iter(VirtualCheckpoint(before)))
    assert all(same_bytes(stream[name], tensor) for name, tensor in direct.items())


def test_preset_that_is_given_wins_over_the_carried_one(
    model: Path, preset: Path, tmp_path: Path
) -> None:
    convert(model, preset, tmp_path / "out")
    other = write_preset(tmp_path / "other", 'match: "*", method: bf16')
    code, text, _ = run("plan", "--model", tmp_path / "out", "--preset", other, "--json")
    assert code == 0
    actions = {layer["name"]: layer["action"] for layer in json.loads(text)["layers"]}
    assert actions["model.layers.0.mlp.up_proj"] == "dequantize"
    code, text, _ = run("plan", "--model", tmp_path / "out", "--json")
    assert {layer["action"] for layer in json.loads(text)["layers"]} == {"as stored"}


def test_overrides_change_the_carried_preset(model: Path, preset: Path, tmp_path: Path) -> None:
    convert(model, preset, tmp_path / "out")
    code, text, _ = run("plan", "--model", tmp_path / "out", "--set", "rules[2].method=bf16")
    assert code == 0
    assert "dequantize" in text


def test_checkpoint_without_a_preset_needs_one(model: Path) -> None:
    code, _, err = run("plan", "--model", model)
    assert code == 2
    assert err == (
        f"mixedprec: error: --preset: is missing, and {model} carries no preset of its own; name a "
        "preset, or a checkpoint that mixedprec convert wrote\n"
    )


def test_inspect_says_that_a_checkpoint_was_converted(
    model: Path, preset: Path, tmp_path: Path
) -> None:
    convert(model, preset, tmp_path / "out")
    code, text, _ = run("inspect", tmp_path / "out")
    assert code == 0
    assert "written by mixedprec convert; carries the preset that it was made with" in text


def test_act_order_is_remembered(tmp_path: Path) -> None:
    config = llama_config(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 64,
                                               "desc_act": True, "sym": True})  # fmt: skip
    all_tensors = llama_tensors(config)
    arguments = {"bits": 4, "group_size": 64, "sym": True, "desc_act": False, "rounding": "nearest"}
    name = "model.layers.1.mlp.down_proj"
    stored = gptq.quantize(all_tensors.pop(f"{name}.weight"), arguments, torch.bfloat16)
    stored["g_idx"] = stored["g_idx"].flip(0).contiguous()
    all_tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in stored.items()}
    model = write_checkpoint(tmp_path / "model", config, all_tensors)
    preset = write_preset(tmp_path, 'match: "*.1.mlp.down_proj", method: gptq, group_size: 64')
    assert convert(model, preset, tmp_path / "out")[0] == 0
    source = open_source(tmp_path / "out")
    plan = resolve_plan(preset_for("", source, (), ""), source, CPU)
    scheme = plan.by_name[name].scheme
    assert scheme is not None
    assert scheme.arguments["desc_act"] is True
    assert same_bytes(dict(iter(VirtualCheckpoint(plan)))[f"{name}.g_idx"], stored["g_idx"])


def test_sources_are_dropped_and_named_in_the_provenance(model: Path, tmp_path: Path) -> None:
    config = llama_config()
    other = write_checkpoint(tmp_path / "other", config, {
        name: tensor * 2 for name, tensor in llama_tensors(config).items()
    })  # fmt: skip
    head = (
        f"sources:\n  double: {{path: {other}}}\nschemes:\n  s: {{method: fp8, source: double}}\n"
    )
    preset = write_preset(
        tmp_path / "presets", 'match: "*.mlp.*", scheme: s',
        'match: "*.0.mlp.*", method: fp8, source: double', head=head,
    )  # fmt: skip
    # the same model with every weight doubled is no copy of it
    text = preset.read_text().replace("version: 1\n", "version: 1\ntrust_sources: true\n")
    preset.write_text(text)
    code, _, err = convert(model, preset, tmp_path / "out")
    assert (code, err) == (0, "")
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "double" not in json.dumps(said)
    provenance = json.loads((tmp_path / "out" / "mixedprec_provenance.json").read_text())
    assert {name: entry["path"] for name, entry in provenance["sources"].items()} == {
        "model": str(model), "double": str(other)
    }  # fmt: skip
    layers = {entry["layer"]: entry for entry in provenance["layers"]}
    entry = layers["model.layers.1.mlp.up_proj"]
    assert (entry["source"], entry["action"], entry["method"]) == ("double", "quantize", "fp8")
    weight = llama_tensors(config)["model.layers.1.mlp.up_proj.weight"] * 2
    digest = hashlib.sha256(weight.view(torch.uint8).numpy().tobytes()).hexdigest()
    assert entry["tensors"] == [
        {"name": "model.layers.1.mlp.up_proj.weight", "file": "model.safetensors", "sha256": digest}
    ]
    stream = dict(iter(open_virtual_checkpoint(model, preset, CPU)))
    assert all(same_bytes(t, stream[name]) for name, t in tensors(tmp_path / "out").items())


def test_parts_have_the_digests_of_the_provenance(
    model: Path, preset: Path, tmp_path: Path
) -> None:
    convert(model, preset, tmp_path / "out", "--max-shard-size", "300KB")
    provenance = json.loads((tmp_path / "out" / "mixedprec_provenance.json").read_text())
    files = contents(tmp_path / "out")
    assert {file: part["sha256"] for file, part in provenance["parts"].items()} == {
        file: digest for file, digest in files.items() if file.endswith(".safetensors")
    }


def test_dtype_of_the_config_is_the_one_converted_for(
    model: Path, preset: Path, tmp_path: Path
) -> None:
    code, _, _ = convert(model, preset, tmp_path / "out", "--dtype", "float16")
    assert code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "float16"
    assert tensors(tmp_path / "out")["model.norm.weight"].dtype == torch.float16


def test_plan_with_errors_is_not_converted(model: Path, tmp_path: Path) -> None:
    broken = write_preset(tmp_path / "broken", 'match: "nothing", method: fp8')
    code, _, err = convert(model, broken, tmp_path / "out")
    assert code == 1
    assert "matches no layer" in err
    assert not (tmp_path / "out").exists()


def test_damaged_weight_leaves_nothing_that_passes_for_whole(tmp_path: Path) -> None:
    config = llama_config()
    all_tensors: dict[str, Any] = llama_tensors(config)
    all_tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = torch.nan
    model = write_checkpoint(tmp_path / "model", config, all_tensors)
    preset = write_preset(tmp_path, 'match: "*.mlp.*", method: fp8')
    code, _, err = convert(model, preset, tmp_path / "out")
    assert code == 1
    assert "weights in model.safetensors are NaN or infinite" in err
    assert not (tmp_path / "out" / "config.json").exists()


def test_nested_config_says_nothing_of_how_weights_were_stored(
    model: Path, preset: Path, tmp_path: Path
) -> None:
    path = model / "config.json"
    said = {"quantization_config": {"quant_method": "fp8"}, "dtype": "bfloat16", "hidden_size": 256}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"text_config": said}))
    assert convert(model, preset, tmp_path / "out", "--dtype", "float16")[0] == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"] == {"dtype": "float16", "hidden_size": 256}
    assert config["quantization_config"]["quant_method"] == "mixedprec"
