"""`mixedprec inspect` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.methods.awq import codec as awq
from mixedprec_plugin.methods.blockwise_int8 import codec as blockwise_int8
from mixedprec_plugin.methods.interface import Target
from tests.checkpoint.peers import FOLDERS, peer_checkpoint
from tests.checkpoint.test_formats import DETECTED
from tests.checkpoints import llama_config, llama_tensors, write_checkpoint, write_llama
from tests.commands import run, run_without_torch
from tests.headers import write_headers
from tests.presets import plan

AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}


def rows(out: str) -> list[str]:
    return [" ".join(line.split()) for line in out.splitlines() if line.strip()]


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """AWQ in the MLPs of layers 1 and 2, INT8 per channel in two o_proj, the rest bf16."""
    config = llama_config(quantization_config=AWQ_CONFIG)
    tensors = llama_tensors(config)
    for name in [n for n in tensors if ".mlp." in n and ".0." not in n]:
        stored = awq.quantize(tensors.pop(name), {"group_size": 128}, torch.float16)
        tensors |= {name.removesuffix("weight") + s: t for s, t in stored.items()}
    for name in [n for n in tensors if "o_proj" in n and ".0." not in n]:
        stored = blockwise_int8.quantize(
            tensors.pop(name), {"weight_block_size": [1, 256]}, torch.float16
        )
        tensors[name] = stored["weight"]
        tensors[name.replace("weight", "weight_scale")] = stored["weight_scale_inv"]
    return write_checkpoint(tmp_path / "model", config, tensors)


def test_inspect_folds_layers_and_reports_disagreements_with_exit_1(mixed: Path) -> None:
    code, out, err = run("inspect", mixed)
    assert (code, err) == (1, "")
    made = rows(out)
    assert made[0] == "layers stored bits bytes a plan can"
    assert made[2:-1] == [
        "model.embed_tokens bfloat16 16.00 160.0 KiB serve as stored",
        "model.layers.0-2.input_layernorm 1.5 KiB serve as stored",
        "model.layers.0.mlp.down_proj bfloat16 16.00 256.0 KiB serve as stored, quantize",
        "model.layers.0.mlp.gate_proj bfloat16 16.00 256.0 KiB serve as stored, quantize",
        "model.layers.0.mlp.up_proj bfloat16 16.00 256.0 KiB serve as stored, quantize",
        "model.layers.0-2.post_attention_layernorm 1.5 KiB serve as stored",
        "model.layers.0-2.self_attn.k_proj bfloat16 16.00 192.0 KiB serve as stored, quantize",
        "model.layers.0.self_attn.o_proj bfloat16 16.00 128.0 KiB serve as stored, quantize",
        "model.layers.0-2.self_attn.q_proj bfloat16 16.00 384.0 KiB serve as stored, quantize",
        "model.layers.0-2.self_attn.v_proj bfloat16 16.00 192.0 KiB serve as stored, quantize",
        *(
            f"model.layers.1-2.mlp.{name} awq 4-bit group 128 4.16 133.0 KiB serve as awq, "
            "dequantize"
            for name in ("down_proj", "gate_proj", "up_proj")
        ),
        "model.layers.1-2.self_attn.o_proj int8 per channel 8.12 130.0 KiB serve as "
        "int8_channel, dequantize",
        "model.norm 512 B serve as stored",
        "29 layers: 2.3 MiB stored",
        "disagreement: model.layers.0.mlp.down_proj, model.layers.0.mlp.gate_proj, "
        "model.layers.0.mlp.up_proj, model.layers.0-2.self_attn.k_proj, "
        "model.layers.0.self_attn.o_proj, model.layers.0-2.self_attn.q_proj, "
        "model.layers.0-2.self_attn.v_proj: is stored as bfloat16, config.json says awq",
    ]
    assert made[-1] == (
        "disagreement: model.layers.1-2.self_attn.o_proj: is stored as int8 per channel, "
        "config.json says awq"
    )


def test_plain_checkpoint_exits_0(tmp_path: Path) -> None:
    code, out, err = run("inspect", write_llama(tmp_path / "model"))
    assert (code, err) == (0, "")
    assert "disagreement" not in out


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_peer_is_shown_as_json(tmp_path: Path, folder: str) -> None:
    code, out, _ = run("inspect", peer_checkpoint(tmp_path / "model", folder), "--json")
    made = json.loads(out)
    assert (code, made["disagreements"]) == (0, [])
    layer = next(x for x in made["layers"] if x["name"].endswith("k_proj"))
    method, arguments, family, description = DETECTED[folder]
    assert (layer["method"], layer["arguments"]) == (method or None, arguments)
    assert (layer["encoding"], layer["stored"]) == (family, description)
    assert layer["shape"] == [192, 576]
    assert layer["bits_per_weight"] == round(8 * layer["bytes"] / (192 * 576), 4)
    assert layer["dequantize"] is (folder != "bf16")
    assert made["bytes"] == sum(x["bytes"] for x in made["layers"])


@pytest.mark.parametrize(
    ("folder", "use"),
    [
        ("autoawq-g64", "serve as awq, dequantize"),
        ("gptqmodel-asym-g64", "repack as awq, dequantize"),
        ("llmcompressor-w4a16-g64", "repack as awq, repack as gptq, repack as humming, dequantize"),
        ("llmcompressor-fp8-block", "repack as fp8, dequantize"),
        ("llmcompressor-w8a8-int8", "serve as int8_channel, dequantize"),
        ("modelopt-nvfp4", "serve as nvfp4, dequantize"),
        ("compressedtensors-nvfp4", "repack as nvfp4, dequantize"),
    ],
)
def test_what_a_plan_can_do_without_a_rounding_is_shown(
    tmp_path: Path, folder: str, use: str
) -> None:
    """And it can: the method that is shown, asked for, gives a plan that repacks."""
    model = peer_checkpoint(tmp_path / "model", folder)
    layers = json.loads(run("inspect", model, "--json")[1])["layers"]
    layer = next(x for x in layers if x["name"].endswith("k_proj"))
    assert layer["use"] == use
    alias = {"fp8": "fp8_block", "humming": "humming_int4"}
    for method in (text.split()[-1] for text in use.split(", ") if text.startswith("repack as")):
        size = "" if method in ("fp8", "nvfp4") else ", group_size: 64"
        rule = f'match: "*_proj", method: {alias.get(method, method)}{size}'
        made = plan(model, rule, target=Target(device="cpu"))
        assert made.by_name[layer["name"]].action == "repack"


def test_missing_folder_exits_1_without_a_traceback(tmp_path: Path) -> None:
    code, out, err = run("inspect", tmp_path / "none")
    assert (code, out) == (1, "")
    assert "none: no such folder" in err


def test_inspect_needs_neither_torch_nor_sglang(tmp_path: Path) -> None:
    model = peer_checkpoint(tmp_path / "model", "llmcompressor-w4a16-asym-g64")
    assert run_without_torch("inspect", model)


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F8_E4M3FNUZ", "F8_E8M0", "C64", "U16"])
@pytest.mark.parametrize("layer", ["model.layers.0.mlp.lut", "model.layers.0.self_attn.q_proj"])
def test_dtypes_that_are_not_read_are_named_and_refused_by_the_plan(
    tmp_path: Path, dtype: str, layer: str
) -> None:
    folder = write_llama(tmp_path / "model")
    tensors = {f"{layer}.{suffix}": (dtype, (256, 256)) for suffix in ("weight", "table")}
    kept = open_source(folder).tensors.items()
    rest = {name: (x.dtype, x.shape) for name, x in kept if name not in tensors}
    write_headers(folder, llama_config(), {**rest, **tensors})
    _, out, _ = run("inspect", str(folder))
    row = next(line for line in rows(out) if line.startswith(layer))
    assert dtype in row
    assert "neither" in row
    preset = tmp_path / "p.yaml"
    preset.write_text("version: 1\nrules: [{match: '*.up_proj', method: fp8}]\n")
    code, _, err = run("plan", "--model", str(folder), "--preset", str(preset))
    assert code == 1
    assert any(f"{layer}: " in line and dtype in line for line in err.splitlines())
