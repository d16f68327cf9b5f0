"""The virtual checkpoint against the quantizers and the stored tensors themselves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from mixedprec_plugin.checkpoint.reader import DTYPE_NAMES
from mixedprec_plugin.compose.stream import VirtualCheckpoint
from mixedprec_plugin.errors import CheckpointError, PlanError
from mixedprec_plugin.methods.awq import codec as awq
from mixedprec_plugin.methods.gptq import codec as gptq
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.methods.stored import TensorSpec
from tests.checkpoints import llama_config, llama_tensors, write_checkpoint, write_llama
from tests.presets import open_virtual_checkpoint, plan, write_preset
from tests.reference import dequantize as independent

AWQ = {"bits": 4, "group_size": 128, "zero_point": True, "rounding": "nearest"}


def test_stream_yields_exactly_what_the_plan_says(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model", parts=3)
    made = plan(
        model,
        'match: "*", method: gptq',
        'match: "*.self_attn.*_proj", method: fp8_block',
        'match: "*.{0..1}.mlp.*", method: awq',
        'match: "*.-1.mlp.*", method: int8',
    )
    seen = {}
    for name, tensor in VirtualCheckpoint(made):
        assert name not in seen
        seen[name] = TensorSpec(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
    assert seen == {
        f"{layer.name}.{suffix}": spec
        for layer in made.layers
        for suffix, spec in layer.outputs.items()
    }
    assert len(VirtualCheckpoint(made)) == len(seen)
    sizes = dict(seen.items())
    assert sum(layer.bytes_after for layer in made.layers) == sum(
        torch.Size(spec.shape).numel() * _itemsize(spec.dtype) for spec in sizes.values()
    )


def _itemsize(dtype: str) -> int:
    return {"BF16": 2, "F16": 2, "F32": 4, "I32": 4, "I8": 1, "F8_E4M3": 1}[dtype]


def test_default_dtype_of_the_process_does_not_change_a_number(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model")
    path = write_preset(tmp_path, 'match: "*", method: fp8', 'match: "*.mlp.*", method: awq')
    plain = dict(iter(open_virtual_checkpoint(model, path)))
    torch.set_default_dtype(torch.bfloat16)
    try:
        loading = dict(iter(open_virtual_checkpoint(model, path)))
    finally:
        torch.set_default_dtype(torch.float32)
    for name, tensor in plain.items():
        assert torch.equal(tensor.float(), loading[name].float()), name


def test_dequantized_layer_is_what_independent_code_reads(tmp_path: Path) -> None:
    config = llama_config()
    tensors = llama_tensors(config)
    name = "model.layers.0.mlp.up_proj"
    stored = awq.quantize(tensors.pop(f"{name}.weight"), AWQ, torch.float16)
    tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in stored.items()}
    model = write_checkpoint(tmp_path / "model", config, tensors)
    preset = write_preset(tmp_path, 'match: "*", method: bf16')
    weight = dict(iter(open_virtual_checkpoint(model, preset)))[f"{name}.weight"]
    arrays = {suffix: tensor.numpy() for suffix, tensor in stored.items()}
    expected = torch.from_numpy(independent.awq(arrays, AWQ).copy())
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, expected.to(torch.bfloat16))


def test_layers_taken_as_stored_are_the_stored_bytes(tmp_path: Path) -> None:
    config = llama_config()
    tensors = llama_tensors(config)
    arguments = {"bits": 4, "group_size": 64, "sym": True, "desc_act": False, "rounding": "nearest"}
    name = "model.layers.1.mlp.down_proj"
    stored = gptq.quantize(tensors.pop(f"{name}.weight"), arguments, torch.bfloat16)
    tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in stored.items()}
    model = write_checkpoint(tmp_path / "model", config, tensors)
    preset = write_preset(tmp_path, 'match: "*.mlp.down_proj", method: gptq, group_size: 64')
    stream = dict(iter(open_virtual_checkpoint(model, preset)))
    for suffix, tensor in stored.items():
        assert torch.equal(stream[f"{name}.{suffix}"], tensor)
    assert torch.equal(stream["model.norm.weight"], tensors["model.norm.weight"])


def test_float32_checkpoint_is_cast_to_the_models_dtype(tmp_path: Path) -> None:
    config = llama_config(torch_dtype="float32")
    tensors = llama_tensors(config, torch.float32)
    model = write_checkpoint(tmp_path / "model", config, tensors)
    preset = write_preset(tmp_path, 'match: "*.mlp.*", method: fp8')
    target = Target(dtype="BF16")
    stream = dict(iter(open_virtual_checkpoint(model, preset, target)))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(stream[name], tensors[name].to(torch.bfloat16))
    assert stream["model.norm.weight"].dtype == torch.bfloat16


def test_plan_with_errors_is_not_streamed(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model")
    with pytest.raises(PlanError, match="matches no layer"):
        VirtualCheckpoint(plan(model, 'match: "nothing", method: fp8'))


def test_source_that_changes_while_it_is_streamed_is_an_error(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model")
    preset = write_preset(tmp_path, 'match: "*.mlp.*", method: fp8')
    stream = iter(open_virtual_checkpoint(model, preset, Target(device="cpu")))
    next(stream)
    os.utime(model / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.safetensors: changed while it was read"):
        list(stream)
