"""Rows that a tool scaled, in slices that AutoAWQ folded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixedprec_plugin.methods import registry
from mixedprec_plugin.plan.pairs import row_scales
from mixedprec_plugin.quantize.codec import load_codec
from tests.checkpoints import llama_config, llama_tensors, write_checkpoint
from tests.plan.mixtures import MLP, mixed_plan, slice_checkpoint, slice_tensors
from tests.quantize.peers import LAYERS, config, numpy_layer, original
from tests.reference.dequantize import dequantize_checkpoint

AWQ = "method: awq, group_size: 64, source: awq"
UNFOLDED = [
    "autoround-awq-asym-g64", "autoround-gptq-g64", "autoround-int8", "autoround-native-g64",
    "gptqmodel-asym-g64", "gptqmodel-fp8-row", "gptqmodel-gptq-g64", "llmcompressor-fp8-block",
    "llmcompressor-fp8-dynamic", "llmcompressor-w4a16-g64", "llmcompressor-w8a8-int8",
]  # fmt: skip


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    return {
        "model": slice_checkpoint(tmp_path / "model", "bf16"),
        "awq": slice_checkpoint(tmp_path / "awq", "autoawq-g64"),
    }


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("folder", UNFOLDED)
def test_quantization_alone_is_not_folding(folder: str, layer: str) -> None:
    weight = torch.from_numpy(
        dequantize_checkpoint(numpy_layer(folder, layer), config(folder)).copy()
    )
    for found in (
        row_scales(weight, original(layer).float()),
        row_scales(original(layer).float(), weight),
    ):
        assert found.is_related
        assert not found.is_folded


@pytest.mark.parametrize("spread", [0.05, 0.2])
def test_small_folds_are_seen_through_the_noise_of_four_bits(spread: float) -> None:
    layer = LAYERS[1]
    folder = "autoround-gptq-g64"
    weight = torch.from_numpy(
        dequantize_checkpoint(numpy_layer(folder, layer), config(folder)).copy()
    )
    generator = torch.Generator().manual_seed(0)
    scales = torch.exp(spread * torch.randn(len(weight), 1, generator=generator))
    assert row_scales(weight * scales, original(layer).float()).is_folded
    assert row_scales(weight * 1.1, original(layer).float()).is_folded


def test_rows_that_are_zero_say_nothing() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    weight[3:] = 0
    found = row_scales(weight, weight)
    assert (found.median, found.deviation, found.is_folded) == (pytest.approx(1), 0, False)


def test_other_weights_are_unrelated() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(64, 64, generator=generator) for _ in range(2))
    assert not row_scales(one, other).is_related


def test_folded_down_without_its_up_is_an_error_that_names_both(sources: dict[str, Path]) -> None:
    plan = mixed_plan(sources["model"], f'match: "*.down_proj", {AWQ}', awq=sources["awq"])
    (problem,) = plan.errors
    assert str(problem) == (
        "model.layers.0.mlp.down_proj: comes from 'awq' and is right only behind its own up_proj, "
        "which comes from 'model': the rows of the two are scaled differently; take up_proj and "
        "down_proj from one source"
    )


def test_folded_up_without_its_down_is_an_error(sources: dict[str, Path]) -> None:
    plan = mixed_plan(sources["model"], f'match: "*.{{gate,up}}_proj", {AWQ}', awq=sources["awq"])
    (problem,) = plan.errors
    assert problem.where == f"{MLP}down_proj"
    assert "comes from 'model' and is right only behind its own up_proj" in problem.what


@pytest.mark.parametrize("rule", ["gate_proj", "{gate,up,down}_proj", "{up,down}_proj"])
def test_pairs_of_one_source_are_right(sources: dict[str, Path], rule: str) -> None:
    line = f'match: "*.{rule}", method: bf16, source: awq'
    assert not mixed_plan(sources["model"], line, awq=sources["awq"]).errors


def test_unfolded_down_may_come_from_elsewhere(tmp_path: Path, sources: dict[str, Path]) -> None:
    # one in 64 bits of a bf16 weight: what a format of 7 bits leaves
    tensors = slice_tensors("bf16")
    generator = torch.Generator().manual_seed(0)
    noisy = {
        name: (t.float() * (1 + torch.randn(t.shape, generator=generator) / 64)).bfloat16()
        for name, t in tensors.items()
        if t.dim() == 2
    }
    other = slice_checkpoint(tmp_path / "other", "bf16", noisy)
    line = 'match: "*.down_proj", method: bf16, source: other'
    assert not mixed_plan(sources["model"], line, other=other).errors


@pytest.mark.parametrize("method", ["awq", "gptq"])
@pytest.mark.parametrize("is_folded", [False, True])
def test_leading_columns_of_a_wide_layer_tell(tmp_path: Path, method: str, is_folded: bool) -> None:
    config = llama_config(
        hidden_size=2048, intermediate_size=128, num_hidden_layers=1, model_type="llama"
    )
    tensors = llama_tensors(config)
    model = write_checkpoint(tmp_path / "model", config, tensors)
    name = "model.layers.0.mlp.up_proj"
    weight = tensors.pop(f"{name}.weight").float()
    if is_folded:
        weight *= torch.linspace(0.8, 1.2, 128)[:, None]
    spec = registry.METHODS[method]
    arguments = registry.bind(method, {"group_size": 64})[1]
    arguments = {**arguments, "desc_act": False} if method == "gptq" else arguments
    made = load_codec(spec.codec).quantize(weight, arguments, torch.float16)
    tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in made.items()}
    other = write_checkpoint(tmp_path / "other", config, tensors)
    line = 'match: "*.down_proj", method: bf16, source: other'
    assert bool(mixed_plan(model, line, other=other).errors) is is_folded


def test_producer_that_is_not_there_to_compare_is_an_error(
    tmp_path: Path, sources: dict[str, Path]
) -> None:
    up = {f"{MLP}up_proj.{suffix}": None for suffix in ("qweight", "qzeros", "scales")}
    bare = slice_checkpoint(tmp_path / "bare", "autoawq-g64", up)
    line = 'match: "*.down_proj", method: awq, group_size: 64, source: bare'
    (problem,) = mixed_plan(sources["model"], line, bare=bare).errors
    head = "trust_sources: true\n"
    assert not mixed_plan(sources["model"], line, head=head, bare=bare).errors
    assert "'bare' holds no up_proj to compare; take up_proj and down_proj from" in str(problem)
