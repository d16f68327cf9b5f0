"""MXFP4 experts as compressed-tensors writes them: planned, repacked, mixed with bf16."""

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
from mixedprec_plugin.convert.compressed import CompressedForm
from mixedprec_plugin.methods.cards import find_gpu
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.plan.resolve import resolve_plan
from mixedprec_plugin.plan.sources import open_other_sources
from tests.checkpoints import write_checkpoint, write_mixtral
from tests.commands import converted, run
from tests.methods.mxfp4.test_codec import theirs_of
from tests.presets import plan, preset, write_preset
from tests.published import Published, qwen3_30b_a3b
from tests.reference.dequantize import e2m1, e8m0

EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1"
OTHER = EXPERT.replace("layers.1", "layers.0")
SAID = {
    "quant_method": "compressed-tensors",
    "format": "mxfp4-pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": [r"re:.*\.experts\.\d+\.\w+$"],
            "format": "mxfp4-pack-quantized",
            "weights": {
                "num_bits": 4, "type": "float", "strategy": "group", "group_size": 32,
                "symmetric": True, "dynamic": False, "scale_dtype": "torch.uint8",
            },
            "input_activations": None,
        }
    },
    "ignore": ["lm_head", r"re:.*\.self_attn\..*", r"re:.*\.gate$"],
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_mixed(tmp_path_factory.mktemp("mxfp4"))


def write_mixed(base: Path) -> tuple[Path, Path]:
    """A Mixtral whose experts compressed-tensors stored in MXFP4, and the bf16 one."""
    original = write_mixtral(base / "original")
    config: dict[str, Any] = json.loads((original / "config.json").read_text())
    tensors = {}
    for name, tensor in load_file(original / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        made = theirs_of(tensor) if ".experts." in name else {"weight": tensor}
        tensors |= {f"{layer}.{suffix}": t.contiguous() for suffix, t in made.items()}
    config["quantization_config"] = SAID
    return write_checkpoint(base / "mx", config, tensors), original


@pytest.mark.parametrize("tp_size", [1, 2])
def test_experts_are_repacked_and_take_four_bits_and_a_quarter(
    folders: tuple[Path, Path], tp_size: int
) -> None:
    target = Target(tp_size=tp_size, gpu=find_gpu("H100"))
    made = plan(folders[0], 'match: "*.experts.*", method: mxfp4', target=target)
    assert [str(problem) for problem in made.errors] == []
    layer = made.by_name[EXPERT]
    assert (layer.action, layer.method) == ("repack", "mxfp4")
    assert layer.bytes_after == layer.num_weights * (4 + 8 / 32) / 8


def test_they_are_mixed_with_those_of_a_bf16_source(folders: tuple[Path, Path]) -> None:
    mixed, original = folders
    rules = preset(
        mixed.parent / "presets",
        'match: "*.experts.*", method: mxfp4',
        'match: "model.layers.0.*.experts.*", method: bf16, source: original',
        head=f"sources:\n  original: {{path: {original}}}\n",
    )
    made = resolve_plan(rules, open_source(mixed), Target("cpu"), open_other_sources(rules))
    assert not made.errors
    stream = dict(iter(VirtualCheckpoint(made)))
    stored = load_file(mixed / "model.safetensors")
    plain = load_file(original / "model.safetensors")
    assert torch.equal(stream[f"{OTHER}.weight"], plain[f"{OTHER}.weight"])
    assert torch.equal(stream[f"{EXPERT}.weight"], stored[f"{EXPERT}.weight_packed"])
    assert torch.equal(stream[f"{EXPERT}.weight_scale"], stored[f"{EXPERT}.weight_scale"])
    with Reader() as reader:
        served = compose_served(made.by_name[EXPERT], made.target, reader)["weight"]
    scales = e8m0(stored[f"{EXPERT}.weight_scale"].numpy())
    expected = e2m1(stored[f"{EXPERT}.weight_packed"].numpy(), scales)
    np.testing.assert_array_equal(served.numpy(), expected)


def test_they_may_be_dequantized(folders: tuple[Path, Path]) -> None:
    made = plan(folders[0], 'match: "*.experts.*", method: bf16', target=Target("cpu"))
    weight = dict(iter(VirtualCheckpoint(made)))[f"{EXPERT}.weight"]
    original = load_file(folders[1] / "model.safetensors")[f"{EXPERT}.weight"]
    distance = (weight.float() - original.float()).norm() / original.float().norm()
    assert 0.09 < distance < 0.13


def test_it_is_not_exported(folders: tuple[Path, Path]) -> None:
    made = plan(folders[1], 'match: "*.experts.*", method: mxfp4', target=Target("cpu"))
    (problem,) = CompressedForm().problems(made)
    assert "SGLang's models but Kimi K3's and DeepSeek V4's pass MXFP4 experts ov" in problem.what


def compressed_headers(made: Published) -> Published:
    """A published bf16 mixture as llm-compressor stores its experts in MXFP4, headers alone."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, (dtype, shape) in made.tensors.items():
        if ".experts." not in name:
            tensors[name] = (dtype, shape)
            continue
        N, K = shape
        layer = name.removesuffix(".weight")
        tensors[f"{layer}.weight_packed"] = ("U8", (N, K // 2))
        tensors[f"{layer}.weight_scale"] = ("U8", (N, K // 32))
    config = {**made.config, "quantization_config": SAID}
    return dataclasses.replace(made, config=config, tensors=tensors)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of it: the others are as these are."""
    made = compressed_headers(qwen3_30b_a3b(num_layers=2))
    return made.write(tmp_path_factory.mktemp("published") / "model")


@pytest.mark.parametrize(
    ("gpu", "tp_size", "message"),
    [
        ("H100", 1, ""),
        ("B200", 8, ""),
        ("A100", 1, "compute capability is 8.0 (expected 9.0 or more)"),
        ("H100", 16, "N = 48 per rank is not a multiple of 32"),
    ],
)
def test_a_published_mixture_is_planned(
    published: Path, gpu: str, tp_size: int, message: str
) -> None:
    target = Target(tp_size=tp_size, gpu=find_gpu(gpu))
    made = plan(published, 'match: "*.experts.*", method: mxfp4', target=target)
    assert bool(made.errors) == bool(message)
    assert any(message in problem.what for problem in made.errors) or not message
    if not message:
        experts = [layer for layer in made.layers if layer.method == "mxfp4"]
        assert {layer.action for layer in experts} == {"repack"}
        # 2 layers of 128 experts, each 3 x 768 x 2048
        assert sum(x.bytes_after for x in experts) == 2 * 128 * 3 * 768 * 2048 * 17 // 32


def test_what_was_converted_is_told_and_verified(folders: tuple[Path, Path]) -> None:
    rules = write_preset(folders[1].parent, 'match: "*.experts.*", method: mxfp4')
    out = converted(folders[1], rules, folders[1].parent / "converted")
    told = {}
    for folder in (folders[0], out):
        code, printed, err = run("inspect", folder, "--json")
        assert code == 0, err
        by_name = {layer["name"]: layer for layer in json.loads(printed)["layers"]}
        told[folder] = by_name[EXPERT]["use"]
    assert told == {folders[0]: "repack as mxfp4, dequantize", out: "serve as mxfp4, dequantize"}
    code, _, err = run("verify", "--model", out, "--reference", folders[1])
    assert code == 0, err
