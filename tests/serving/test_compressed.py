"""Checkpoints exported as compressed-tensors, in stock SGLang without our load format."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints import llama_config, llama_tensors, write_llama
from tests.commands import converted
from tests.presets import EXPORTED, write_preset
from tests.reference.dequantize import e2m1
from tests.serving.stock import load
from tests.tensors import as_integers, raw

RULES = (*EXPORTED, 'match: "*.2.self_attn.o_proj", method: fp8')
SCHEMES = {
    "model.layers.0.self_attn.qkv_proj": "CompressedTensorsW8A8Fp8",
    "model.layers.0.self_attn.o_proj": "CompressedTensorsW8A8Fp8",
    "model.layers.0.mlp.gate_up_proj": "CompressedTensorsWNA16",
    "model.layers.0.mlp.down_proj": "CompressedTensorsW4A16Fp4",
    "model.layers.1.self_attn.qkv_proj": None,
    "model.layers.1.self_attn.o_proj": None,
    "model.layers.1.mlp.gate_up_proj": "CompressedTensorsWNA16",
    "model.layers.1.mlp.down_proj": "CompressedTensorsWNA16",
    "model.layers.2.self_attn.qkv_proj": "CompressedTensorsW8A8Fp8",
    "model.layers.2.self_attn.o_proj": "CompressedTensorsW8A8Fp8",
    "model.layers.2.mlp.gate_up_proj": "CompressedTensorsW8A8Fp8",
    "model.layers.2.mlp.down_proj": "CompressedTensorsW8A8Int8",
}


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    model = write_llama(tmp_path / "model")
    preset = write_preset(tmp_path, *RULES)
    flags = ("--format", "compressed-tensors")
    return converted(model, preset, tmp_path / "out", *flags, device="cuda")


@pytest.fixture
def stock(sglang_context: SimpleNamespace, exported: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model as SGLang's own loader fills it on an H100, before kernels repack it."""
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_loader.loader import DefaultModelLoader

    # the one thing that schemes ask of a GPU before their weights are processed
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(DefaultModelLoader, "postprocess_weights", staticmethod(lambda *_: None))
    assert ModelConfig(str(exported), dtype="bfloat16").quantization == "compressed-tensors"
    return load(exported)


def test_stock_sglang_finds_a_scheme_for_every_layer(stock: Any) -> None:
    found = {
        name: type(module.scheme).__name__ if getattr(module, "scheme", None) else None
        for name, module in stock.named_modules()
        if name in SCHEMES
    }
    assert found == SCHEMES


def test_stock_sglang_fills_every_parameter_with_the_stored_numbers(
    stock: Any, exported: Path
) -> None:
    stored = load_file(exported / "model.safetensors")
    shards = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    checked = set()
    for module_name in SCHEMES:
        parent, _, last = module_name.rpartition(".")
        names = [f"{parent}.{shard}" for shard in shards.get(last, (last,))]
        for suffix, parameter in stock.get_submodule(module_name).named_parameters():
            parts = [as_integers(stored[f"{name}.{suffix}"]) for name in names]
            checked.update(f"{name}.{suffix}" for name in names)
            whole = parts[-1] if suffix == "weight_shape" else torch.cat(parts)
            assert torch.equal(raw(parameter), raw(whole)), suffix
    assert checked == {name for name in stored if "_proj." in name}
    others = {name: p for name, p in stock.named_parameters() if "_proj." not in name}
    assert others.keys() == {name for name in stored if "_proj." not in name}
    for name, parameter in others.items():
        assert torch.equal(parameter.data[: len(stored[name])], stored[name]), name


def test_what_stock_sglang_holds_is_the_model_that_was_quantized(stock: Any) -> None:
    """Read back by what the formats mean, a number at a time, it is within a rounding of bf16's."""
    original = llama_tensors(llama_config())
    shards = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    for module_name, scheme in SCHEMES.items():
        parent, _, last = module_name.rpartition(".")
        names = [f"{parent}.{shard}.weight" for shard in shards.get(last, (last,))]
        whole = torch.cat([original[name].float() for name in names])
        held = {n: p.data for n, p in stock.get_submodule(module_name).named_parameters()}
        read, step = _READ[scheme](held, [len(original[name]) for name in names])
        assert bool(((read - whole).abs() <= step).all()), module_name


Read = tuple[torch.Tensor, torch.Tensor | float]


def _plain(held: dict[str, torch.Tensor], _rows: list[int]) -> Read:
    return held["weight"].float(), 0.0


def _packed(held: dict[str, torch.Tensor], _rows: list[int]) -> Read:
    """Codes from the low bits of a word on; without zero points the middle code is zero."""
    N, K = held["weight_packed"].shape[0], int(held["weight_shape"][1])
    bits = 32 * held["weight_packed"].shape[1] // K
    codes = torch.stack(
        [(held["weight_packed"] >> bits * i) & ((1 << bits) - 1) for i in range(32 // bits)], -1
    ).reshape(N, K)
    zeros = torch.full((N, 1), 1 << (bits - 1))
    if "weight_zero_point" in held:
        words = held["weight_zero_point"]
        zeros = torch.stack([(words >> 4 * i) & 15 for i in range(8)], 1).reshape(N, -1)
    scales = held["weight_scale"].float()
    size = K // scales.shape[1]
    wide = scales.repeat_interleave(size, 1)
    zeros = zeros.repeat_interleave(K // zeros.shape[1], 1)
    # half a step, and a whole one where a range ends or the scale was rounded to bfloat16
    return (codes - zeros) * wide, 1.02 * wide.abs()


def _float8(held: dict[str, torch.Tensor], rows: list[int]) -> Read:
    """A scale for each block of 128 x 128, each output channel, or each shard."""
    weight, scales = held["weight"].float(), held["weight_scale"]
    if scales.numel() == len(weight):
        wide = scales.reshape(-1, 1)
    elif scales.numel() > len(rows):
        wide = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    else:
        wide = scales.reshape(-1).repeat_interleave(torch.tensor(rows))[:, None]
    read = weight * wide
    # three bits of mantissa: half a step is a sixteenth; below the normal numbers, of 2^-6
    return read, read.abs() / 15 + wide * 2**-10


def _int8(held: dict[str, torch.Tensor], _rows: list[int]) -> Read:
    """A scale for each output channel."""
    return held["weight"].float() * held["weight_scale"], held["weight_scale"] * 0.5001


def _float4(held: dict[str, torch.Tensor], _rows: list[int]) -> Read:
    """A scale for each 16 codes, of which the two largest are 4 and 6."""
    packed, scales = held["weight_packed"].numpy(), held["weight_scale"].float()
    whole = held["weight_global_scale"].float()
    read = torch.from_numpy(e2m1(packed, scales.numpy())) / whole
    # half of their distance; or what is beyond 6 where a scale was rounded down, a fifth at most
    return read, 1.3 * scales.repeat_interleave(16, 1) / whole


_READ = {
    None: _plain, "CompressedTensorsWNA16": _packed, "CompressedTensorsW8A8Fp8": _float8,
    "CompressedTensorsW8A8Int8": _int8, "CompressedTensorsW4A16Fp4": _float4,
}  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what becomes of it without a GPU")
def test_without_a_gpu_stock_sglang_serves_no_compressed_tensors(
    sglang_context: SimpleNamespace, exported: Path
) -> None:
    """Its config asks for the compute capability of every scheme, before a weight is there."""
    with pytest.raises(RuntimeError, match="NVIDIA driver") as raised:
        load(exported)
    frames = [entry for entry in raised.traceback if "sglang" in str(entry.path)]
    assert frames[-1].path.name == "compressed_tensors.py"
    assert frames[-1].name == "_check_scheme_supported"
