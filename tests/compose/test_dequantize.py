"""Layers that other tools stored, through the virtual checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixedprec_plugin.compose.stream import VirtualCheckpoint
from mixedprec_plugin.errors import CheckpointError
from mixedprec_plugin.methods.interface import Target
from tests.checkpoint.peers import FOLDERS, peer_checkpoint
from tests.checkpoint.test_formats import DETECTED
from tests.presets import plan, problem_texts
from tests.quantize.peers import FILE, LAYERS, PEERS, config, numpy_layer, original, torch_layer
from tests.reference.dequantize import dequantize_checkpoint

CPU = Target(device="cpu")
BF16 = 'match: "*_proj", method: bf16'
SERVED = [folder for folder, (method, *_) in DETECTED.items() if method in ("awq", "gptq")]


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("folder", FOLDERS)
def test_every_peer_dequantizes_to_the_references_bits(
    tmp_path: Path, folder: str, dtype: str
) -> None:
    model = peer_checkpoint(tmp_path / "model", folder)
    rule = 'match: "*_proj", method: unquantized'
    made = plan(model, rule, target=Target(device="cpu", dtype=dtype))
    stream = dict(iter(VirtualCheckpoint(made)))
    torch_dtype = {"BF16": torch.bfloat16, "F16": torch.float16}[dtype]
    for layer in LAYERS:
        if folder == "bf16":
            expected = original(layer)
        else:
            arrays = dequantize_checkpoint(numpy_layer(folder, layer), config(folder))
            expected = torch.from_numpy(arrays.copy())
        assert torch.equal(stream[f"{layer}.weight"], expected.to(torch_dtype))
        assert {name for name in stream if name.startswith(layer)} == {f"{layer}.weight"}


@pytest.mark.parametrize("folder", SERVED)
def test_peer_of_a_method_is_taken_as_stored(tmp_path: Path, folder: str) -> None:
    model = peer_checkpoint(tmp_path / "model", folder)
    made = plan(
        model, f'match: "*_proj", method: {DETECTED[folder][0]}, group_size: 64', target=CPU
    )
    foreseen = ("does not run on CUDA", "its float16 scales are rounded to bfloat16")
    assert all(any(text in t for text in foreseen) for t in problem_texts(made))
    stream = dict(iter(VirtualCheckpoint(made)))
    for layer in LAYERS:
        for suffix, tensor in torch_layer(folder, layer).items():
            served = stream[f"{layer}.{suffix}"]
            assert torch.equal(served, tensor.to(served.dtype))


def test_missing_g_idx_is_groups_in_order(tmp_path: Path) -> None:
    model = peer_checkpoint(tmp_path / "model", "autoround-native-g64")
    stream = dict(iter(VirtualCheckpoint(plan(model, 'match: "none", method: bf16, optional: true',
                                              target=CPU))))  # fmt: skip
    theirs = torch_layer("autoround-gptq-g64", LAYERS[0])["g_idx"]
    assert torch.equal(stream[f"{LAYERS[0]}.g_idx"], theirs)


@pytest.mark.parametrize("folder", [f for f in FOLDERS if DETECTED[f][0] == ""])
def test_what_no_method_serves_needs_a_rule_to_be_dequantized(tmp_path: Path, folder: str) -> None:
    model = peer_checkpoint(tmp_path / "model", folder)
    ways = {
        'match: "*norm", method: bf16': "or method: bf16 to dequantize it",
        'match: "*_proj", method: fp8': "method: bf16 to dequantize it, or write requantize: true",
    }
    for rule, way in ways.items():
        (problem,) = plan(model, rule, target=CPU).errors
        assert str(problem) == (
            f"model.layers.0.self_attn.k_proj, model.layers.0.self_attn.v_proj: is stored as "
            f"{DETECTED[folder][3]}, which no method serves as it is; match it with method: auto "
            f"to serve it as it is, {way}"
        )
    for rule in ("method: auto", "method: bf16", "method: fp8, requantize: true"):
        assert not plan(model, f'match: "*_proj", {rule}', target=CPU).errors


def test_gptq_over_awq_is_an_error_that_says_so(tmp_path: Path) -> None:
    model = peer_checkpoint(tmp_path / "model", "autoawq-g64")
    (problem,) = plan(model, 'match: "*_proj", method: gptq, group_size: 64', target=CPU).errors
    assert "is stored as awq 4-bit group 64, not as gptq asks (gptq)" in str(problem)


def test_disagreement_with_the_config_is_a_warning_of_the_plan(tmp_path: Path) -> None:
    model = peer_checkpoint(tmp_path / "model", "autoawq-g64", group_size=128)
    texts = problem_texts(plan(model, BF16, target=CPU))
    assert texts == [
        "warning: model.layers.0.self_attn.k_proj, model.layers.0.self_attn.v_proj: is stored with "
        "group_size 64, config.json says 128; its tensors decide; check that the checkpoint is "
        "whole"
    ]


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        ("qzeros", lambda tensor: tensor + 1, r"k_proj: its zero points are not all 8"),
        ("g_idx", lambda tensor: tensor.flip(0), r"k_proj: its g_idx is not in order"),
    ],
)
def test_gptq_values_that_kernels_do_not_read_are_refused(
    tmp_path: Path, suffix: str, change: object, message: str
) -> None:
    model = peer_checkpoint(tmp_path / "model", "gptqmodel-gptq-g64")
    stored = load_file(PEERS / "gptqmodel-gptq-g64" / FILE)
    name = f"{LAYERS[0]}.{suffix}"
    assert callable(change)
    stored[name] = change(stored[name]).contiguous()
    (model / "model.safetensors").unlink()
    save_file(stored, model / "model.safetensors")
    made = plan(model, 'match: "*_proj", method: gptq, group_size: 64', target=CPU)
    with pytest.raises(CheckpointError, match=message + r".*; write method: bf16 to dequantize it"):
        dict(iter(VirtualCheckpoint(made)))
    dict(iter(VirtualCheckpoint(plan(model, BF16, target=CPU))))


@pytest.mark.parametrize("group", [-1, 9])
def test_group_index_out_of_range_is_refused(tmp_path: Path, group: int) -> None:
    model = peer_checkpoint(tmp_path / "model", "gptqmodel-gptq-g64", desc_act=True)
    stored = load_file(PEERS / "gptqmodel-gptq-g64" / FILE)
    # 576 columns are 9 groups of 64
    stored[f"{LAYERS[0]}.g_idx"][100] = group
    (model / "model.safetensors").unlink()
    save_file(stored, model / "model.safetensors")
    rule = 'match: "*_proj", method: gptq, group_size: 64, desc_act: true'
    made = plan(model, rule, target=CPU).check()
    message = r"k_proj: its g_idx holds groups from .* .expected 0 to 8, as it has scales for 9"
    with pytest.raises(CheckpointError, match=message):
        dict(iter(VirtualCheckpoint(made)))


def test_reciprocal_scale_of_zero_is_refused(tmp_path: Path) -> None:
    model = peer_checkpoint(tmp_path / "model", "gptqmodel-fp8-row")
    stored = load_file(PEERS / "gptqmodel-fp8-row" / FILE)
    stored[f"{LAYERS[0]}.weight_scale_inv"][3] = 0
    (model / "model.safetensors").unlink()
    save_file(stored, model / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"k_proj: its fp8 per channel .* dequantize to NaN or"
    ):
        dict(iter(VirtualCheckpoint(plan(model, BF16, target=CPU))))


def test_quantized_lm_head_is_taken_or_dequantized_by_a_rule(tmp_path: Path) -> None:
    model = peer_checkpoint(tmp_path / "model", "autoawq-g64")
    stored = load_file(PEERS / "autoawq-g64" / FILE)
    stored |= {f"lm_head.{s}": t.clone() for s, t in torch_layer("autoawq-g64", LAYERS[0]).items()}
    (model / "model.safetensors").unlink()
    save_file(stored, model / "model.safetensors")
    made = plan(model, BF16, target=CPU)
    assert not made.errors
    layer = made.by_name["lm_head"]
    assert (layer.action, layer.method, layer.rule) == ("as stored", "awq", None)
    floats = plan(model, BF16, 'match: "lm_head", method: bf16', target=CPU)
    assert not floats.errors
    assert floats.by_name["lm_head"].action == "dequantize"
    read = dequantize_checkpoint(numpy_layer("autoawq-g64", LAYERS[0]), config("autoawq-g64"))
    expected = torch.from_numpy(read.copy()).bfloat16()
    assert torch.equal(dict(iter(VirtualCheckpoint(floats)))["lm_head.weight"], expected)


def test_torchaos_row_scaled_codes_dequantize_by_hand(tmp_path: Path) -> None:
    model = peer_checkpoint(tmp_path / "model", "bf16")
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (64, 128), generator=generator, dtype=torch.int8)
    zeros = torch.randint(-9, 9, (64, 4), generator=generator, dtype=torch.int8)
    scales = torch.rand(64, 4, generator=generator)
    parts = {"_weight_qdata": codes, "_weight_scale": scales, "_weight_zero_point": zeros}
    (model / "model.safetensors").unlink()
    save_file(
        {f"model.layers.0.mlp.up_proj.{suffix}": tensor for suffix, tensor in parts.items()},
        model / "model.safetensors",
    )
    stream = dict(iter(VirtualCheckpoint(plan(model, BF16, target=CPU))))
    spread = [tensor.float().repeat_interleave(32, dim=1) for tensor in (zeros, scales)]
    expected = (codes.float() - spread[0]) * spread[1]
    assert set(stream) == {"model.layers.0.mlp.up_proj.weight"}
    assert torch.equal(stream["model.layers.0.mlp.up_proj.weight"], expected.to(torch.bfloat16))


def test_dequantized_fp8_layer_keeps_no_activation_scale(tmp_path: Path) -> None:
    model = peer_checkpoint(tmp_path / "model", "bf16")
    name = "model.layers.0.mlp.up_proj"
    codes = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    stored = {"weight": codes, "weight_scale": torch.tensor([0.37]), "input_scale": torch.ones(1)}
    (model / "model.safetensors").unlink()
    save_file({f"{name}.{s}": t for s, t in stored.items()}, model / "model.safetensors")
    stream = dict(iter(VirtualCheckpoint(plan(model, BF16, target=CPU))))
    expected = (codes.float() * torch.tensor(0.37)).to(torch.bfloat16)
    assert set(stream) == {f"{name}.weight"}
    assert torch.equal(stream[f"{name}.weight"], expected)
