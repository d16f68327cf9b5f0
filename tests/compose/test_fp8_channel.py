"""FP8 with a scale a channel: taken as stored, repacked, quantized, dequantized, requantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mixedprec_plugin.checkpoint.headers import read_bytes
from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.compose.stream import VirtualCheckpoint
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.methods.stored import TensorSpec
from mixedprec_plugin.plan.model import Plan
from mixedprec_plugin.plan.resolve import resolve_plan
from tests.checkpoint.peers import peer_checkpoint
from tests.checkpoints import llama_config, llama_tensors, write_checkpoint
from tests.presets import plan, preset
from tests.quantize.peers import LAYERS, config, numpy_layer, original, relative_rms, torch_layer
from tests.reference.dequantize import by_channel, dequantize_checkpoint

CPU = Target(device="cpu")
LAYER = "model.layers.0.mlp.down_proj"
N, K = 256, 384
Tensors = dict[str, torch.Tensor]


def stream(made: Plan, layer: str) -> Tensors:
    """The tensors of one layer of a plan."""
    assert not made.errors, made.errors
    return {
        name.removeprefix(f"{layer}."): tensor
        for name, tensor in VirtualCheckpoint(made)
        if name.startswith(f"{layer}.")
    }


def fp8_model(folder: Path, scale: torch.Tensor, suffix: str = "weight_scale", **more: Any) -> Path:
    """A checkpoint of one FP8 layer with random codes."""
    codes = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    tensors = {"weight": codes.to(torch.float8_e4m3fn), suffix: scale, **more}
    said = {"torch_dtype": "bfloat16", "quantization_config": {"quant_method": "fp8"}}
    return write_checkpoint(folder, said, {f"{LAYER}.{s}": t for s, t in tensors.items()})


def dequantized(tensors: Tensors) -> np.ndarray:
    return by_channel(tensors["weight"].float().numpy(), tensors["weight_scale"].float().numpy())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["fp8_channel", "fp8_dynamic", "fp8_per_channel", "w8a8_fp8"])
def test_llm_compressors_fp8_dynamic_is_taken_as_stored(
    tmp_path: Path, name: str, device: Any
) -> None:
    model = peer_checkpoint(tmp_path / "model", "llmcompressor-fp8-dynamic")
    made = plan(model, f'match: "*_proj", method: {name}', target=Target(device=device))
    for layer in LAYERS:
        planned, stored = made.by_name[layer], torch_layer("llmcompressor-fp8-dynamic", layer)
        assert (planned.action, planned.method) == ("as stored", "fp8_channel")
        assert planned.outputs == {
            "weight": TensorSpec("F8_E4M3", (192, 576)),
            "weight_scale": TensorSpec("F32", (192, 1)),
        }
        assert 8 * planned.bytes_after / planned.num_weights == 8 + 32 / 576
        taken = stream(made, layer)
        assert torch.equal(taken["weight"].view(torch.uint8), stored["weight"].view(torch.uint8))
        assert torch.equal(taken["weight_scale"], stored["weight_scale"].float())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_layers_that_no_rule_names_are_served_as_they_are(tmp_path: Path, device: Any) -> None:
    model = peer_checkpoint(tmp_path / "model", "llmcompressor-fp8-dynamic")
    rule = 'match: "*.k_proj", method: fp8_channel'
    made = plan(model, rule, target=Target(device=device))
    layer = made.by_name["model.layers.0.self_attn.v_proj"]
    assert (layer.rule, layer.action, layer.method) == (None, "as stored", "fp8_channel")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_is_repeated_over_the_rows(
    tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    scale = torch.full(shape, 0.37, dtype=dtype)
    model = fp8_model(tmp_path / "model", scale)
    made = plan(model, 'match: "*_proj", method: fp8_channel', target=CPU)
    assert made.by_name[LAYER].action == "repack"
    repacked, stored = stream(made, LAYER), open_source(model).layers[LAYER]
    assert set(repacked) == {"weight", "weight_scale"}
    assert torch.equal(repacked["weight_scale"], scale.float().reshape(1, 1).expand(N, 1))
    codes = read_bytes(stored["weight"], 0, N * K)
    assert (repacked["weight"].view(torch.uint8).numpy().ravel() == codes).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_in_one_dimension_become_a_column(tmp_path: Path, dtype: torch.dtype) -> None:
    scale = torch.linspace(0.01, 3, N).to(dtype)
    model = fp8_model(tmp_path / "model", scale)
    made = plan(model, 'match: "*_proj", method: fp8_channel', target=CPU)
    assert made.by_name[LAYER].action == "repack"
    assert torch.equal(stream(made, LAYER)["weight_scale"], scale.float()[:, None])


def test_static_activations_are_not_made_dynamic_by_repacking(tmp_path: Path) -> None:
    model = fp8_model(tmp_path / "model", torch.tensor(0.5), input_scale=torch.tensor(0.1))
    (problem,) = plan(model, 'match: "*_proj", method: fp8_channel', target=CPU).errors
    assert "is stored as fp8 per tensor, not as fp8_channel asks (fp8_channel); write" in str(
        problem
    )


def test_scales_that_divide_are_not_repacked(tmp_path: Path) -> None:
    model = peer_checkpoint(tmp_path / "model", "gptqmodel-fp8-row")
    (problem,) = plan(model, 'match: "*_proj", method: fp8_channel', target=CPU).errors
    assert "fp8 per channel (reciprocal scales), which no method serves as it is" in str(problem)
    rule = 'match: "*_proj", method: fp8_channel, requantize: true'
    made = plan(model, rule, target=CPU)
    assert made.by_name[LAYERS[0]].action == "requantize"
    stored = dequantize_checkpoint(
        numpy_layer("gptqmodel-fp8-row", LAYERS[0]), config("gptqmodel-fp8-row")
    )
    # the same grid but for a rounding of its scales: most weights stay where they are
    again = dequantized(stream(made, LAYERS[0]))
    assert np.abs(again - stored).max() <= np.abs(stored).max() * 2**-4
    assert (np.isclose(again, stored, rtol=1e-6, atol=0)).mean() > 0.99


def test_bf16_is_quantized(tmp_path: Path) -> None:
    model = peer_checkpoint(tmp_path / "model", "bf16")
    made = plan(model, 'match: "*_proj", method: fp8_channel', target=CPU)
    assert made.by_name[LAYERS[0]].action == "quantize"
    weight = torch.from_numpy(dequantized(stream(made, LAYERS[0])))
    assert relative_rms(weight, original(LAYERS[0])) == pytest.approx(0.026, rel=0.05)


def test_bf16_dequantizes_it(tmp_path: Path) -> None:
    folder = "llmcompressor-fp8-dynamic"
    model = peer_checkpoint(tmp_path / "model", folder)
    made = plan(model, 'match: "*_proj", method: bf16', target=CPU)
    assert made.by_name[LAYERS[0]].action == "dequantize"
    stored = dequantize_checkpoint(numpy_layer(folder, LAYERS[0]), config(folder))
    expected = torch.from_numpy(np.ascontiguousarray(stored)).bfloat16()
    assert torch.equal(stream(made, LAYERS[0])["weight"], expected)


def test_shards_of_several_sources_keep_their_own_scales(tmp_path: Path) -> None:
    """q with one scale, k with one a channel, v in bf16: one fused module, nothing rounded anew."""
    generator = torch.Generator().manual_seed(0)
    plain = llama_tensors(llama_config())
    stored: dict[str, Tensors] = {"q": dict(plain), "k": dict(plain)}
    for projection, shape in (("q", ()), ("k", None)):
        for name in [name for name in plain if name.endswith(f"{projection}_proj.weight")]:
            rows = len(plain[name])
            scale = torch.rand(shape if shape is not None else (rows, 1), generator=generator)
            scale = scale / 100 + 0.001
            codes = (plain[name].float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            stored[projection] |= {name: codes, f"{name}_scale": scale}
    model = write_checkpoint(tmp_path / "model", llama_config(), plain)
    folders = {
        name: write_checkpoint(tmp_path / name, llama_config(), tensors)
        for name, tensors in stored.items()
    }
    head = "".join(f"  {name}: {{path: {folder}}}\n" for name, folder in folders.items())
    rules = (
        'match: "*.self_attn.*", method: fp8_channel',
        'match: "*.q_proj", method: fp8_channel, source: q',
        'match: "*.k_proj", method: fp8_channel, source: k',
    )
    loaded = preset(tmp_path, *rules, head=f"sources:\n{head}")
    others = {name: open_source(folder, name) for name, folder in folders.items()}
    for target in (CPU, Target()):
        made = resolve_plan(loaded, open_source(model), target, others)
        assert not made.problems
        actions = [layer.action for layer in made.modules["model.layers.0.self_attn.qkv_proj"]]
        assert actions == ["repack", "as stored", "quantize"]
    for projection in ("q", "k"):
        layer = f"model.layers.0.self_attn.{projection}_proj"
        own = stream(made, layer)
        theirs = stored[projection]
        expected = by_channel(
            theirs[f"{layer}.weight"].float().numpy(), theirs[f"{layer}.weight_scale"].numpy()
        )
        assert (dequantized(own) == expected).all()
