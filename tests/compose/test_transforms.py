"""Transforms that run with a checkpoint's layers, taken into their weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.transform import TransformConfig, apply_transform_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mixedprec_plugin.checkpoint.reader import Reader
from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.compose.parts import compose_parts
from mixedprec_plugin.compose.stream import VirtualCheckpoint, compose_floats, compose_layer
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.plan.model import Plan
from mixedprec_plugin.plan.resolve import resolve_plan
from tests.commands import run
from tests.presets import plan, preset

DATA = Path(__file__).parents[1] / "data" / "transforms"
CPU = Target(device="cpu")


def step(location: str, inverse: bool, *targets: str) -> dict[str, Any]:
    return {"targets": list(targets) or ["Linear"], "ignore": ["lm_head"], "location": location,
            "inverse": inverse}  # fmt: skip


def quip(type: str, **more: Any) -> dict[str, Any]:
    """As llm-compressor's `QuIPModifier` writes it."""
    v = [step("input", False), step("weight_input", True)]
    u = [step("weight_output", False), step("output", True)]
    return {key: {"type": type, "apply": steps, **more} for key, steps in (("v", v), ("u", u))}


def r4(**more: Any) -> dict[str, Any]:
    """As llm-compressor's `SpinQuantModifier` writes the rotation of down_proj."""
    down = "re:.*down_proj$"
    steps = [step("input", False, down), step("weight_input", True, down)]
    return {"R4": {"type": "hadamard", "apply": steps, **more}}


CASES = {
    "quip-hadamard": quip("hadamard"),
    "quip-hadamard-16": quip("hadamard", head_dim=16),
    "quip-hadamard-permuted": quip("hadamard", randomize=True),
    "quip-random-hadamard": quip("random-hadamard"),
    "quip-random-hadamard-32": quip("random-hadamard", head_dim=32, precision="torch.float64"),
    "quip-random-matrix": quip("random-matrix", head_dim=16, precision="torch.float64"),
    "r4": r4(),
    "r4-random": r4(type="random-hadamard"),
    "r4-of-one-layer": {"R4": {"type": "hadamard", "head_dim": 64, "apply": [
        step("input", True, "re:.*layers[.]1[.].*down_proj$"),
        step("weight_input", False, "re:.*layers[.]1[.].*down_proj$")]}},
}  # fmt: skip


def transformed(folder: Path, groups: dict[str, Any]) -> tuple[Path, LlamaForCausalLM, Any]:
    """A checkpoint that compressed-tensors transforms; its model, and the weights before."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=96, tie_word_embeddings=False,
        attention_bias=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).float().eval()
    for name, parameter in model.named_parameters():
        parameter.data.normal_(0, 1.0 if name.endswith("bias") else 0.1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    apply_transform_config(model, TransformConfig(config_groups=groups))
    seen: set[int] = set()
    tensors = {}
    # as `save_pretrained` does: what layers share is stored once
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            tensors[name] = tensor.contiguous()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    said = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {},
            "transform_config": {"config_groups": groups}}  # fmt: skip
    written = {**config.to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps({**written, "quantization_config": said}))
    return folder, model, before


def made_plan(model: Path, rule: str = "method: bf16") -> Plan:
    made = plan(model, f'match: "*_proj", {rule}', target=CPU)
    assert made.errors == ()
    return made


@pytest.mark.parametrize("case", CASES)
def test_a_layer_is_that_of_the_model_without_transforms(tmp_path: Path, case: str) -> None:
    folder, model, before = transformed(tmp_path / "model", CASES[case])
    made = made_plan(folder)
    turned = [layer for layer in made.layers if layer.stored is not None and layer.stored.turns]
    assert len(turned) == (14 if "quip" in case else 2) - case.endswith("one-layer")
    # the library rounds what it divides by a random matrix to float32
    atol = 5e-3 if case.endswith("matrix") else 2e-5
    with Reader() as reader:
        for layer in turned:
            floats = compose_floats(layer, CPU, reader)
            torch.testing.assert_close(
                floats["weight"], before[f"{layer.name}.weight"], rtol=0, atol=atol
            )
            # and what the library's own layer computes, its transforms running
            module = model.get_submodule(layer.name)
            x = torch.randn(5, module.in_features, generator=torch.Generator().manual_seed(1))
            y = torch.nn.functional.linear(x, floats["weight"], floats.get("bias"))
            torch.testing.assert_close(y, module(x), rtol=1e-4, atol=5 * atol)
            served = compose_layer(layer, CPU, reader)
            parts = compose_parts(layer, CPU, reader)
            assert served.keys() == parts.keys() == {
                n.rpartition(".")[2] for n in before if n.startswith(f"{layer.name}.")
            }  # fmt: skip
            for suffix, tensor in served.items():
                assert torch.equal(parts[suffix] + 0, tensor)
                expected = before[f"{layer.name}.{suffix}"]
                torch.testing.assert_close(tensor.float(), expected, rtol=2**-8, atol=atol)


def test_sylvesters_matrix_need_not_be_stored(tmp_path: Path) -> None:
    folder, _, before = transformed(tmp_path / "model", r4(head_dim=32))
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: t for name, t in tensors.items() if "R4_input" not in name}
    save_file(tensors, folder / "model.safetensors")
    layer = made_plan(folder).by_name["model.layers.1.mlp.down_proj"]
    with Reader() as reader:
        floats = compose_floats(layer, CPU, reader)
    torch.testing.assert_close(floats["weight"], before[f"{layer.name}.weight"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("tool", ["quip", "spinquant"])
def test_the_tools_own_model_predicts_the_same(tmp_path: Path, tool: str) -> None:
    data = DATA / f"llmcompressor-{tool}"
    made = made_plan(shutil.copytree(data, tmp_path / "model"), "method: bf16")
    config = LlamaConfig.from_pretrained(data)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with Reader() as reader:
        weights = {
            f"{layer.name}.{suffix}": tensor.float()
            for layer in made.layers
            for suffix, tensor in compose_floats(layer, CPU, reader).items()
            if suffix in ("weight", "bias")
        }
    model.load_state_dict(weights)
    with torch.no_grad():
        logits = model(torch.arange(64).reshape(2, 32)).logits
    expected = load_file(data / "logits.safetensors")["logits"]
    assert float((logits - expected).norm() / expected.norm()) < 1e-4


def test_its_layers_go_with_those_of_the_model_without_transforms(tmp_path: Path) -> None:
    folder, _, before = transformed(tmp_path / "quip", quip("random-hadamard"))
    model = tmp_path / "model"
    model.mkdir()
    save_file(before, model / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (model / "config.json").write_text(json.dumps(config))
    head = f"sources: {{quip: {{path: {json.dumps(str(folder))}}}}}\n"
    rules = preset(tmp_path / "p", 'match: "*.mlp.*", method: bf16, source: quip', head=head)
    source = open_source(folder, "quip")
    made = resolve_plan(rules, open_source(model), CPU, {"quip": source})
    assert made.errors == ()
    name = "model.layers.0.mlp.up_proj.weight"
    served = dict(iter(VirtualCheckpoint(made)))[name].float()
    torch.testing.assert_close(served, before[name], rtol=2**-8, atol=2e-5)


def test_it_is_quantized_anew_and_converted(tmp_path: Path) -> None:
    model = shutil.copytree(DATA / "llmcompressor-quip", tmp_path / "model")
    preset = tmp_path / "preset.yaml"
    preset.write_text(
        'version: 1\nrules: [{match: "*_proj", method: int8_channel, requantize: true}]\n'
    )
    code, _, err = run("convert", "--model", model, "--preset", preset, "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert not [name for name in tensors if "v_input" in name or "u_output" in name]
    before = made_plan(model)
    with Reader() as reader:
        for layer in before.layers:
            if layer.kind == "linear":
                floats = compose_floats(layer, CPU, reader)["weight"]
                made = tensors[f"{layer.name}.weight"].float()
                made = made * tensors[f"{layer.name}.weight_scale"]
                assert float((made - floats).norm() / floats.norm()) < 0.01


@pytest.mark.parametrize("rule", ["method: auto", "method: gptq, group_size: 32"])
def test_it_is_never_taken_as_stored_and_the_remedies_work(tmp_path: Path, rule: str) -> None:
    model = shutil.copytree(DATA / "llmcompressor-quip", tmp_path / "model")
    made = plan(model, f'match: "*_proj", {rule}', target=Target())
    text = str(made.errors[0])
    assert "is stored as pack-quantized 4-bit group 32 with transform_config" in text
    assert "match it with method: bf16 to dequantize it" in text
    assert not plan(model, 'match: "*_proj", method: bf16', target=Target()).errors


def test_what_is_only_in_the_weights_is_served_as_stored(tmp_path: Path) -> None:
    model = shutil.copytree(DATA / "llmcompressor-spinquant", tmp_path / "model")
    layers = made_plan(model, "method: gptq, group_size: 32, requantize: true").by_name
    actions = {name.rpartition(".")[2]: layers[f"model.layers.0.{name}"].action for name in (
        "self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")}  # fmt: skip
    assert actions == dict.fromkeys(("q_proj", "o_proj", "up_proj"), "repack") | {
        "down_proj": "requantize"
    }
