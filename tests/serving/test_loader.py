"""The loader on SGLang's own Llama, in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mixedprec_plugin.errors import LoadError
from mixedprec_plugin.methods.fp8 import codec as fp8
from mixedprec_plugin.methods.interface import Target
from tests.checkpoints import llama_config, llama_tensors, write_checkpoint, write_llama
from tests.presets import open_virtual_checkpoint, write_preset
from tests.serving.stock import load, load_again, loader_of
from tests.tensors import as_integers, raw

LoadModel = Callable[..., Any]
METHODS = (
    "bf16", "fp8", "fp8_block", "fp8_channel", "int8", "int8_channel", "awq", "gptq", "gptq_int8",
    "humming_int3", "nvfp4",
)  # fmt: skip


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "model", parts=3)


@pytest.fixture
def as_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave parameters as the weight loaders filled them, before methods repack them."""
    from mixedprec_plugin.serving.loader import MixedPrecisionLoader

    monkeypatch.setattr(MixedPrecisionLoader, "postprocess_weights", staticmethod(lambda *_: None))


@pytest.mark.usefixtures("as_loaded")
@pytest.mark.parametrize("method", METHODS)
def test_every_stored_number_arrives_in_its_parameter(
    load_model: LoadModel, model_path: Path, tmp_path: Path, method: str
) -> None:
    preset = write_preset(tmp_path, f'match: "*", method: {method}')
    model = load_model(model_path, preset)
    stream = dict(iter(open_virtual_checkpoint(model_path, preset, Target(device="cpu"))))
    layer = model.model.layers[1]
    for name, module in (
        ("self_attn.o_proj", layer.self_attn.o_proj), ("mlp.down_proj", layer.mlp.down_proj)
    ):  # fmt: skip
        held = dict(module.named_parameters())
        assert held
        for suffix, parameter in held.items():
            stored = stream[f"model.layers.1.{name}.{suffix}"]
            assert parameter.dtype == stored.dtype
            assert torch.equal(raw(parameter.data), raw(stored).reshape(raw(parameter).shape))


@pytest.mark.usefixtures("as_loaded")
@pytest.mark.parametrize(
    ("method", "suffixes"),
    [
        ("fp8_block", {"weight": 0, "weight_scale_inv": 0}),
        ("fp8_channel", {"weight": 0, "weight_scale": 0}),
        ("int8", {"weight": 0, "weight_scale_inv": 0}),
        ("int8_channel", {"weight": 0, "weight_scale": 0}),
        ("awq", {"qweight": 1, "qzeros": 1, "scales": 1}),
        ("gptq", {"qweight": 1, "qzeros": 1, "scales": 1}),
        ("humming_int3", {"weight": 0, "weight_scale": 0}),
        ("nvfp4", {"weight": 0, "weight_scale": 0}),
        ("bf16", {"weight": 0}),
    ],
)
def test_fused_module_holds_its_shards_in_order(
    load_model: LoadModel, model_path: Path, tmp_path: Path, method: str, suffixes: dict[str, int]
) -> None:
    preset = write_preset(tmp_path, f'match: "*", method: {method}')
    model = load_model(model_path, preset)
    stream = dict(iter(open_virtual_checkpoint(model_path, preset, Target(device="cpu"))))
    qkv, gate_up = model.model.layers[2].self_attn.qkv_proj, model.model.layers[2].mlp.gate_up_proj
    for module, names in (
        (qkv, [f"self_attn.{shard}_proj" for shard in "qkv"]),
        (gate_up, ["mlp.gate_proj", "mlp.up_proj"]),
    ):
        for suffix, axis in suffixes.items():
            shards = [stream[f"model.layers.2.{name}.{suffix}"] for name in names]
            whole = torch.cat([as_integers(shard) for shard in shards], dim=axis)
            assert torch.equal(as_integers(getattr(module, suffix).data), whole), suffix


def test_plan_is_written_as_json(load_model: LoadModel, model_path: Path, tmp_path: Path) -> None:
    preset = write_preset(tmp_path, 'match: "*.mlp.*", method: gptq')
    path = tmp_path / "plan.json"
    load_model(model_path, preset, mixedprec_plan=str(path))
    made = json.loads(path.read_text())
    methods = {layer["name"]: layer["method"] for layer in made["layers"]}
    assert methods["model.layers.0.mlp.up_proj"] == "gptq"
    assert methods["model.layers.0.self_attn.q_proj"] == "bf16"
    assert made["problems"] == []


def family(name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A small random checkpoint of a dense family: its config.json and its tensors."""
    architecture, model_type = {
        "llama": ("LlamaForCausalLM", "llama"),
        "mistral": ("MistralForCausalLM", "mistral"),
        "qwen2": ("Qwen2ForCausalLM", "qwen2"),
        "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    }[name]
    config = llama_config(
        architectures=[architecture], model_type=model_type, tie_word_embeddings=name == "qwen3"
    )
    tensors = llama_tensors(config)
    for layer in range(config["num_hidden_layers"]):
        attention = f"model.layers.{layer}.self_attn"
        if name == "qwen2":
            for shard in "qkv":
                size = tensors[f"{attention}.{shard}_proj.weight"].shape[0]
                tensors[f"{attention}.{shard}_proj.bias"] = torch.randn(size).to(torch.bfloat16)
        if name == "qwen3":
            for norm in ("q_norm", "k_norm"):
                tensors[f"{attention}.{norm}.weight"] = torch.rand(64).to(torch.bfloat16)
    return config, tensors


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_bf16_model_is_the_one_that_sglang_loads_by_itself(
    load_model: LoadModel, tmp_path: Path, name: str
) -> None:
    model_path = write_checkpoint(tmp_path / "model", *family(name), parts=2)
    ours = load_model(model_path, write_preset(tmp_path, 'match: "*", method: bf16'))
    theirs = dict(load(model_path).named_parameters())
    held = dict(ours.named_parameters())
    assert held.keys() == theirs.keys()
    for parameter_name, parameter in held.items():
        assert torch.equal(parameter, theirs[parameter_name]), parameter_name


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3"])
def test_quantized_families_load_with_every_parameter_filled(
    load_model: LoadModel, tmp_path: Path, name: str
) -> None:
    model_path = write_checkpoint(tmp_path / "model", *family(name))
    preset = write_preset(
        tmp_path, 'match: "*", method: fp8_block', 'match: "*.mlp.*", method: awq'
    )
    model = load_model(model_path, preset)
    qkv = model.model.layers[0].self_attn.qkv_proj
    assert type(qkv.quant_method).__name__ == "Fp8LinearMethod"
    if name == "qwen2":
        bias = [
            dict(iter(open_virtual_checkpoint(model_path, preset)))[
                f"model.layers.0.self_attn.{shard}_proj.bias"
            ]
            for shard in "qkv"
        ]
        assert torch.equal(qkv.bias.data, torch.cat(bias))


def test_tensors_that_come_past_the_plan_are_refused(
    load_model: LoadModel, model_path: Path, tmp_path: Path
) -> None:
    model = load_model(model_path, write_preset(tmp_path, 'match: "*", method: fp8'))
    weight = torch.zeros(256, 256, dtype=torch.bfloat16)
    with pytest.raises(LoadError, match="use update_weights_from_disk"):
        model.load_weights([("model.layers.0.self_attn.o_proj.weight", weight)])


def test_tensors_of_the_load_format_direct_are_refused(
    load_model: LoadModel, model_path: Path, tmp_path: Path
) -> None:
    from sglang.srt.model_executor.model_runner_components import weight_updater

    model = load_model(model_path, write_preset(tmp_path, 'match: "*", method: fp8'))
    before = model.model.norm.weight.clone()
    tensors = [("model.norm.weight", torch.zeros_like(before))]
    with pytest.raises(LoadError, match="use update_weights_from_disk"):
        weight_updater._model_load_weights_direct(model, tensors)
    assert torch.equal(model.model.norm.weight, before)
    other = torch.nn.Linear(2, 2, bias=False)
    weight_updater._model_load_weights_direct(other, [("weight", torch.ones(2, 2))])
    assert torch.equal(other.weight, torch.ones(2, 2))


@pytest.mark.parametrize("method", METHODS)
def test_new_weights_load_where_sglang_restores_nothing_before(
    load_model: LoadModel, tmp_path: Path, method: str
) -> None:
    """As SGLang 0.5.21 and 0.5.22 do: weight_updater.py calls the loader alone."""
    first = write_llama(tmp_path / "first")
    config = llama_config()
    others = {name: tensor * 0.5 for name, tensor in llama_tensors(config).items()}
    second = write_checkpoint(tmp_path / "second", config, others)
    preset = write_preset(tmp_path, f'match: "*", method: {method}')
    expected = load_model(second, preset)
    model = load_model(first, preset)
    loader, model_config = loader_of(second, load_format="mixedprec")
    for _ in range(2):
        load_again(loader, model_config, model)
        loader._has_opened_new_path = False
    held = dict(expected.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(raw(parameter), raw(held[name])), name


@pytest.mark.usefixtures("as_loaded")
def test_quantized_checkpoint_is_served_as_stored_beside_its_own_quantization_config(
    load_model: LoadModel, tmp_path: Path
) -> None:
    config = llama_config(
        quantization_config={
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        }
    )
    tensors = llama_tensors(config)
    arguments = {"weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        made = fp8.quantize(tensors.pop(name), arguments, torch.bfloat16)
        tensors |= {name.removesuffix("weight") + suffix: t for suffix, t in made.items()}
    model_path = write_checkpoint(tmp_path / "model", config, tensors)
    model = load_model(model_path, write_preset(tmp_path, 'match: "*.down_proj", method: bf16'))
    layer = model.model.layers[1]
    assert type(layer.self_attn.o_proj.quant_method).__name__ == "Fp8LinearMethod"
    assert type(layer.mlp.down_proj.quant_method).__name__ == "UnquantizedLinearMethod"
    stored = tensors["model.layers.1.self_attn.o_proj.weight"]
    assert torch.equal(raw(layer.self_attn.o_proj.weight), raw(stored))
    codes = {
        s: tensors[f"model.layers.1.mlp.down_proj.{s}"] for s in ("weight", "weight_scale_inv")
    }
    grid = codes["weight_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
    expected = (codes["weight"].float() * grid).to(torch.bfloat16)
    assert torch.equal(layer.mlp.down_proj.weight.data, expected)
