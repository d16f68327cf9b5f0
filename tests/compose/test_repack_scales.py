"""Scales of FP8 and INT8 that other tools name or shape otherwise, taken over as they are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mixedprec_plugin.errors import CheckpointError
from mixedprec_plugin.methods.fp8 import codec as fp8
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.quantize.codec import load_codec
from tests.checkpoint.peers import peer_checkpoint
from tests.checkpoints import write_checkpoint
from tests.compose.repacking import LAYER, compressed, layer_of, stream
from tests.presets import plan
from tests.quantize.peers import LAYERS, config, numpy_layer, torch_layer
from tests.reference.dequantize import dequantize_checkpoint

BLOCKS = {"num_bits": 8, "strategy": "block", "block_structure": [128, 128], "symmetric": True}
GROUP_128 = {"dynamic": True, "group_size": 128, "strategy": "group", "num_bits": 8}


@pytest.mark.parametrize(
    ("kind", "rule", "dtype"),
    [
        ("float", "method: fp8_block", torch.float8_e4m3fn),
        ("int", "method: blockwise_int8", torch.int8),
    ],
)
def test_blocks_under_llm_compressors_names_are_taken(
    tmp_path: Path, kind: str, rule: str, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-99, 99, (256, 384), generator=generator).to(dtype)
    scales = torch.rand(2, 3, generator=generator).to(torch.bfloat16)
    tensors = {f"{LAYER}.weight": codes, f"{LAYER}.weight_scale": scales}
    weights = {**BLOCKS, "type": kind}
    model = write_checkpoint(
        tmp_path / "model", compressed(f"{kind}-quantized", weights, GROUP_128), tensors
    )
    made = layer_of(stream(model, rule), LAYER)
    assert set(made) == {"weight", "weight_scale_inv"}
    assert made["weight_scale_inv"].dtype == torch.float32
    assert torch.equal(made["weight_scale_inv"], scales.float())
    assert torch.equal(made["weight"].view(torch.uint8), codes.view(torch.uint8))


@pytest.mark.parametrize("inputs", [None, GROUP_128 | {"group_size": 64}, {"dynamic": False}])
def test_blocks_whose_activations_are_not_quantized_in_such_groups_are_refused(
    tmp_path: Path, inputs: dict[str, Any] | None
) -> None:
    tensors = {
        f"{LAYER}.weight": torch.zeros(256, 384).to(torch.float8_e4m3fn),
        f"{LAYER}.weight_scale": torch.ones(2, 3),
    }
    config = compressed("float-quantized", {**BLOCKS, "type": "float"}, inputs)
    model = write_checkpoint(tmp_path / "model", config, tensors)
    (problem,) = plan(model, 'match: "*", method: fp8_block', target=Target(device="cpu")).errors
    assert "is stored as fp8 block [128, 128] (float-quantized)" in str(problem)


def test_llm_compressors_own_block_file_keeps_codes_and_scales(tmp_path: Path) -> None:
    """Its K = 576 runs in no block kernel, so the plan refuses the shape, not the format."""
    model = peer_checkpoint(tmp_path / "model", "llmcompressor-fp8-block")
    made = plan(model, 'match: "*_proj", method: fp8_block', target=Target(device="cpu"))
    assert [p.what for p in made.errors] == [
        "K = 576 is not a multiple of 128, the block size along K and the group of its activations"
    ]
    layer = made.by_name[LAYERS[0]]
    assert layer.action == "repack"
    assert layer.stored is not None
    assert layer.scheme is not None
    stored = torch_layer("llmcompressor-fp8-block", LAYERS[0])
    numbers = load_codec(layer.stored.codec).read(stored, layer.stored.how)
    repacked = fp8.write(numbers, layer.scheme.arguments, torch.bfloat16)
    expected = dequantize_checkpoint(
        numpy_layer("llmcompressor-fp8-block", LAYERS[0]), config("llmcompressor-fp8-block")
    )
    read = fp8.read(repacked, {"weight_block_size": [128, 128]}).dequantize()
    assert torch.equal(read, torch.from_numpy(expected.copy()))


@pytest.mark.parametrize(
    ("suffix", "shape", "dtype"),
    [
        ("weight_scale", (1, 1), torch.float32),
        ("weight_scale", (1, 1), torch.bfloat16),
        ("weight_scale_inv", (), torch.bfloat16),
        ("weight_scale_inv", (1,), torch.float32),
    ],
)
def test_one_scale_a_tensor_is_taken_under_any_name_and_dtype(
    tmp_path: Path, suffix: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    codes = torch.randn(256, 384, generator=torch.Generator().manual_seed(0))
    stored = codes.to(torch.float8_e4m3fn)
    scale = torch.full(shape, 0.37, dtype=dtype)
    config = {"torch_dtype": "bfloat16", "quantization_config": {"quant_method": "fp8"}}
    model = write_checkpoint(
        tmp_path / "model", config, {f"{LAYER}.weight": stored, f"{LAYER}.{suffix}": scale}
    )
    made = layer_of(stream(model, "method: fp8"), LAYER)
    assert set(made) == {"weight", "weight_scale"}
    assert torch.equal(made["weight_scale"], scale.float().reshape(()))
    assert torch.equal(made["weight"].view(torch.uint8), stored.view(torch.uint8))


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("llmcompressor-fp8-dynamic", r"not as fp8 asks .*; write method: fp8_channel, bf16 to"),
        ("gptqmodel-fp8-row", "which no method serves as it is"),
    ],
)
def test_one_scale_a_channel_is_not_one_a_tensor(tmp_path: Path, folder: str, message: str) -> None:
    model = peer_checkpoint(tmp_path / "model", folder)
    (problem,) = plan(model, 'match: "*_proj", method: fp8', target=Target(device="cpu")).errors
    assert re.search(message, str(problem))


@pytest.mark.parametrize(
    ("suffix", "rule", "made"),
    [
        ("weight_global_scale", "method: nvfp4", "weight_scale_2"),
        ("input_global_scale", "method: nvfp4, keep_input_scale: true", "input_scale"),
    ],
)
def test_scale_of_zero_that_divides_is_refused(
    tmp_path: Path, suffix: str, rule: str, made: str
) -> None:
    # compressed-tensors' NVFP4PackedCompressor: W = q * weight_scale / weight_global_scale
    tensors = {
        f"{LAYER}.weight_packed": torch.zeros(256, 192, dtype=torch.uint8),
        f"{LAYER}.weight_scale": torch.ones(256, 24).to(torch.float8_e4m3fn),
        f"{LAYER}.weight_global_scale": torch.ones(1),
        f"{LAYER}.input_global_scale": torch.ones(1),
    }
    tensors[f"{LAYER}.{suffix}"].zero_()
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    config = compressed("nvfp4-pack-quantized", weights, weights)
    model = write_checkpoint(tmp_path / "model", config, tensors)
    with pytest.raises(CheckpointError, match=f"{LAYER}: .* make a {made} that is infinite; the"):
        stream(model, rule)
