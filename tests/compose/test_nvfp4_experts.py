"""NVFP4 experts beside FP8 attention, as ModelOpt writes them: planned, and mixed with bf16."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mixedprec_plugin.checkpoint.reader import Reader
from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.compose.stream import VirtualCheckpoint, compose_served
from mixedprec_plugin.methods.cards import find_gpu
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.plan.resolve import resolve_plan
from mixedprec_plugin.plan.sources import open_other_sources
from tests.checkpoints import write_checkpoint, write_mixtral
from tests.presets import plan, preset
from tests.published import Published, qwen3_30b_a3b
from tests.reference.dequantize import nvfp4

ATTENTION, EXPERT = (
    "model.layers.1.self_attn.q_proj",
    "model.layers.1.block_sparse_moe.experts.2.w1",
)
OTHER = EXPERT.replace("layers.1", "layers.0")


def modelopt_experts(shape: torch.Size, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Codes and scales at random; gate and up have one scale of the whole, as ModelOpt has it."""
    N, K = shape
    scales = torch.rand(N, K // 16, generator=generator) * 400 + 40
    return {
        "weight": torch.randint(0, 256, (N, K // 2), generator=generator).to(torch.uint8),
        "weight_scale": scales.to(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(3.1e-5),
        "input_scale": torch.tensor(2.4e-3),
    }


def modelopt_attention(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    scale = weight.float().abs().max() / 448
    codes = (weight.float() / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.01)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_mixed(tmp_path_factory.mktemp("nvfp4"))


def write_mixed(base: Path) -> tuple[Path, Path]:
    """A Mixtral in NVFP4 and FP8, with the config.json of such checkpoints; and the bf16 one."""
    original = write_mixtral(base / "original")
    config: dict[str, Any] = json.loads((original / "config.json").read_text())
    generator = torch.Generator().manual_seed(0)
    tensors, layers = {}, {}
    for name, tensor in load_file(original / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        made = {"weight": tensor}
        if ".experts." in name:
            made = modelopt_experts(tensor.shape, generator)
            layers[layer] = {"quant_algo": "NVFP4", "group_size": 16}
        elif ".self_attn." in name:
            made = modelopt_attention(tensor)
            layers[layer] = {"quant_algo": "FP8"}
        tensors |= {f"{layer}.{suffix}": t.contiguous() for suffix, t in made.items()}
    config["quantization_config"] = {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": layers,
        "ignore": ["lm_head", "model.layers.*.block_sparse_moe.gate"],
    }
    return write_checkpoint(base / "mixed", config, tensors), original


@pytest.mark.parametrize("tp_size", [1, 2])
def test_it_is_planned_as_it_is_stored_without_a_word(
    folders: tuple[Path, Path], tp_size: int
) -> None:
    made = plan(folders[0], 'match: "*.mlp.*", method: bf16, optional: true',
                target=Target(tp_size=tp_size))  # fmt: skip
    assert not made.errors
    planned = {name: made.by_name[name] for name in (ATTENTION, EXPERT)}
    assert {layer.action for layer in planned.values()} == {"as stored"}
    assert [layer.method for layer in planned.values()] == ["fp8", "nvfp4"]
    assert planned[EXPERT].scheme.arguments["keep_input_scale"] is True  # type: ignore[union-attr]
    # 4 bits, 8 for each 16 of them, and two float32 for all
    stored = planned[EXPERT]
    assert stored.bytes_after == stored.num_weights * (4 + 8 / 16) / 8 + 8


def test_its_experts_are_mixed_with_those_of_a_bf16_source(folders: tuple[Path, Path]) -> None:
    mixed, original = folders
    rules = preset(
        mixed.parent / "presets",
        'match: "*.experts.*", method: nvfp4',
        'match: "*.self_attn.*", method: fp8, activation_scheme: static',
        'match: "model.layers.0.*.experts.*", method: bf16, source: original',
        head=f"sources:\n  original: {{path: {original}}}\n",
    )
    made = resolve_plan(rules, open_source(mixed), Target("cpu"), open_other_sources(rules))
    assert not made.errors
    assert [made.by_name[name].action for name in (ATTENTION, EXPERT, OTHER)] == [
        "as stored", "repack", "as stored"
    ]  # fmt: skip
    stream = dict(iter(VirtualCheckpoint(made)))
    stored, plain = (
        load_file(mixed / "model.safetensors"),
        load_file(original / "model.safetensors"),
    )
    assert torch.equal(stream[f"{OTHER}.weight"], plain[f"{OTHER}.weight"])
    assert torch.equal(stream[f"{EXPERT}.weight"], stored[f"{EXPERT}.weight"])
    assert f"{EXPERT}.input_scale" not in stream
    assert stream[f"{ATTENTION}.input_scale"] == stored[f"{ATTENTION}.input_scale"]
    with Reader() as reader:
        served = compose_served(made.by_name[EXPERT], made.target, reader)["weight"]
    arrays = {
        suffix: stored[f"{EXPERT}.{suffix}"].float().numpy()
        for suffix in ("weight_scale", "weight_scale_2")
    }
    codes = stored[f"{EXPERT}.weight"].numpy()
    np.testing.assert_array_equal(served.numpy(), nvfp4({"weight": codes, **arrays}, {}))


def modelopt_headers(made: Published) -> Published:
    """A published bf16 mixture as ModelOpt's MIXED_PRECISION recipes store it, headers alone."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    layers: dict[str, dict[str, Any]] = {}
    one: tuple[str, tuple[int, ...]] = ("F32", ())
    for name, (dtype, shape) in made.tensors.items():
        layer = name.removesuffix(".weight")
        tensors[name] = (dtype, shape)
        if ".experts." in name:
            N, K = shape
            tensors |= {
                name: ("U8", (N, K // 2)),
                f"{layer}.weight_scale": ("F8_E4M3", (N, K // 16)),
            }
            tensors |= {f"{layer}.weight_scale_2": one, f"{layer}.input_scale": one}
            layers[layer] = {"quant_algo": "NVFP4", "group_size": 16}
        elif "_proj" in name:
            tensors |= {name: ("F8_E4M3", shape), f"{layer}.weight_scale": one}
            tensors[f"{layer}.input_scale"] = one
            layers[layer] = {"quant_algo": "FP8"}
        if layer.endswith(("k_proj", "v_proj")):
            tensors[f"{layer}.{layer[-6]}_scale"] = one
    said = {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
        "quantized_layers": layers,
        "ignore": ["lm_head", "model.layers.*.mlp.gate"],
    }
    return dataclasses.replace(
        made, config={**made.config, "quantization_config": said}, tensors=tensors
    )


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Four layers of Qwen3-30B-A3B in NVFP4 and FP8, and of the bf16 release, without weights."""
    base, plain = tmp_path_factory.mktemp("published"), qwen3_30b_a3b(num_layers=4)
    return modelopt_headers(plain).write(base / "mixed"), plain.write(base / "original")


@pytest.mark.parametrize("gpu", ["A100", "H100", "B200"])
@pytest.mark.parametrize("tp_size", [1, 4])
def test_a_published_mixture_is_planned_beside_its_bf16_release(
    published: tuple[Path, Path], tp_size: int, gpu: str
) -> None:
    mixed, original = published
    rules = preset(
        mixed.parent / "presets",
        'match: "*.experts.*", method: nvfp4',
        'match: "*.self_attn.*_proj", method: fp8, activation_scheme: static',
        'match: "model.layers.{0..1}.*.experts.*", method: bf16, source: original',
        head=f"sources:\n  original: {{path: {original}}}\n",
    )
    target = Target(tp_size=tp_size, gpu=find_gpu(gpu))
    made = resolve_plan(rules, open_source(mixed), target, open_other_sources(rules))
    assert [str(problem) for problem in made.errors] == []
    actions = {
        (layer.method, layer.action, layer.source)
        for layer in made.layers
        if layer.kind in ("expert", "linear")
    }
    assert actions == {
        ("fp8", "as stored", "model"),
        ("nvfp4", "repack", "model"),
        ("bf16", "as stored", "original"),
    }
    experts = [layer for layer in made.layers if layer.method == "nvfp4"]
    # 2 layers of 128 experts, each 3 x 768 x 2048
    assert len(experts) == 2 * 128 * 3
    weights = 2 * 128 * 3 * 768 * 2048
    assert sum(layer.bytes_after for layer in experts) == weights * 9 // 16 + 4 * len(experts)


def test_ranks_whose_share_marlin_does_not_take_are_told_how_many_do(
    published: tuple[Path, Path],
) -> None:
    """768 over eight ranks is 96, and Marlin's experts need 64."""
    made = plan(published[0], 'match: "*.experts.*", method: nvfp4', target=Target(tp_size=8))
    assert made.errors
    for problem in made.errors:
        sizes = ("K = 96 per rank", "N = 192 per rank of gate and up together")
        assert problem.what.startswith(sizes), problem
        assert "serve with --tp 4" in problem.remedy, problem
