from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.compose.stream import VirtualCheckpoint
from mixedprec_plugin.methods.interface import Device, Target
from mixedprec_plugin.methods.registry import METHODS, bind
from mixedprec_plugin.plan.resolve import resolve_plan
from mixedprec_plugin.quantize.codec import load_codec
from tests.checkpoint.peers import FOLDERS, peer_checkpoint
from tests.checkpoints import llama_config, llama_tensors, write_checkpoint
from tests.presets import plan, preset, problem_texts
from tests.quantize.peers import LAYERS, config, numpy_layer, torch_layer
from tests.quantize.peers import relative_rms as distance
from tests.reference.dequantize import dequantize_checkpoint

CPU = Target(device="cpu")


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("fp8", {}),
        ("fp8_block", {}),
        ("fp8_channel", {}),
        ("int8", {}),
        ("int8", {"weight_block_size": [64, 64]}),
        ("int8_channel", {}),
        ("awq", {"group_size": 128}),
        ("awq", {"group_size": 32}),
        ("gptq", {"group_size": 64, "desc_act": False}),
        ("gptq", {"group_size": -1, "desc_act": False}),
        ("gptq_int8", {"group_size": 128, "desc_act": False}),
        ("humming_int2", {}),
        ("humming_int3", {"group_size": 64}),
        ("humming", {}),
        ("nvfp4", {}),
        ("mxfp4", {}),
    ],
)
def test_foretold_error_is_what_quantizers_make_of_normal_numbers(
    name: str, given: dict[str, Any]
) -> None:
    method, arguments = bind(name, given)
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    stored = load_codec(METHODS[method].codec).quantize(weight, arguments, torch.bfloat16)
    read = load_codec(METHODS[method].codec).read(stored, arguments).dequantize()
    measured = distance(read, weight)
    expected = METHODS[method].rounding(arguments).error(512, 1024)
    assert expected == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    ("folder", "rule", "percent"),
    [
        ("autoawq-g64", "method: fp8", "2.6%"),
        ("llmcompressor-w4a16-asym-g64", "method: gptq, group_size: 64", "8.7%"),
        ("llmcompressor-w8a8-int8", "method: awq, group_size: 64", "8.8%"),
        ("gptqmodel-fp8-row", "method: fp8", "2.6%"),
    ],
)
def test_second_rounding_is_a_warning_that_foretells_its_size(
    tmp_path: Path, folder: str, rule: str, percent: str
) -> None:
    model = peer_checkpoint(tmp_path / "model", folder)
    made = plan(model, f'match: "*_proj", {rule}, requantize: true', target=CPU)
    layer = made.by_name[LAYERS[0]]
    assert layer.stored is not None
    assert layer.scheme is not None
    texts = [t for t in problem_texts(made) if "does not run on CUDA" not in t]
    assert texts == [
        "warning: model.layers.0.self_attn.k_proj, model.layers.0.self_attn.v_proj: is rounded "
        f"twice: what {layer.stored.description} lost stays lost, and {layer.scheme.label} adds an "
        f"error of about {percent} of the weights' RMS; take it from an unquantized source for one "
        "rounding"
    ]
    first = torch.from_numpy(
        dequantize_checkpoint(numpy_layer(folder, layer.name), config(folder)).copy()
    )
    tensors = {
        name.removeprefix(f"{layer.name}."): tensor
        for name, tensor in VirtualCheckpoint(made)
        if name.startswith(layer.name)
    }
    second = (
        load_codec(METHODS[layer.method].codec).read(tensors, layer.scheme.arguments).dequantize()
    )
    assert distance(second, first) == pytest.approx(float(percent[:-1]) / 100, rel=0.35)


def test_scales_that_are_rounded_in_repacking_are_a_warning(tmp_path: Path) -> None:
    model = peer_checkpoint(tmp_path / "model", "gptqmodel-gptq-g64")
    rule = 'match: "*_proj", method: awq, group_size: 64'
    (text,) = [t for t in problem_texts(plan(model, rule, target=CPU)) if "CUDA" not in t]
    assert text.endswith(
        "its codes are kept, its float16 scales are rounded to bfloat16, up to 0.2% each; start "
        "with --dtype float16 to keep them"
    )
    exact = Target(device="cpu", dtype="F16")
    assert all("CUDA" in t for t in problem_texts(plan(model, rule, target=exact)))


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_scales_that_are_rounded_as_they_are_placed_are_the_same_warning(
    tmp_path: Path, folder: str, device: Device
) -> None:
    """SGLang's classes keep them in the model's dtype, which their loaders copy them into."""
    model, rule = peer_checkpoint(tmp_path / "model", folder), 'match: "*_proj", method: auto'
    made = plan(model, rule, target=Target(device=device))
    warned = [text for text in problem_texts(made) if "scales are rounded to bfloat16" in text]
    layer = made.by_name[LAYERS[0]]
    assert len(warned) == (layer.action == "as stored" and _has_float16_scales(folder))
    exact = plan(model, rule, target=Target(device=device, dtype="F16"))
    assert not any("scales are rounded" in text for text in problem_texts(exact))


def _has_float16_scales(folder: str) -> bool:
    stored = torch_layer(folder, LAYERS[0])
    return "scales" in stored and stored["scales"].dtype == torch.float16


def test_layers_that_lose_the_same_are_one_warning(tmp_path: Path) -> None:
    from mixedprec_plugin.methods.gptq import codec as gptq

    tensors = llama_tensors(llama_config())
    arguments = {"bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    for name in [n for n in tensors if ".mlp." in n]:
        made = gptq.quantize(tensors.pop(name), arguments, torch.bfloat16)
        tensors |= {name.removesuffix("weight") + suffix: t for suffix, t in made.items()}
    model = write_checkpoint(tmp_path / "model", llama_config(), tensors)
    (problem,) = plan(model, 'match: "*.mlp.*", method: fp8_block, requantize: true').problems
    assert problem.where == (
        "model.layers.0-2.mlp.down_proj, model.layers.0-2.mlp.gate_proj, "
        "model.layers.0-2.mlp.up_proj"
    )


def test_per_tensor_shards_of_several_sources_warn_of_the_cards_that_round_them(
    tmp_path: Path,
) -> None:
    from mixedprec_plugin.methods.fp8 import codec as fp8

    arguments = {"weight_block_size": None, "activation_scheme": "dynamic"}
    tensors = llama_tensors(llama_config())
    model = write_checkpoint(tmp_path / "model", llama_config(), tensors)
    for name in [n for n in tensors if "self_attn" in n]:
        made = fp8.quantize(tensors.pop(name), arguments, torch.bfloat16)
        tensors |= {name.removesuffix("weight") + suffix: t for suffix, t in made.items()}
    other = write_checkpoint(tmp_path / "other", llama_config(), tensors)
    rules = ('match: "*", method: fp8', 'match: "*.q_proj", method: fp8, source: other')
    loaded = preset(tmp_path, *rules, head=f"sources: {{other: {{path: {other}}}}}\n")
    sources = {"other": open_source(other, "other")}
    made_plan = resolve_plan(loaded, open_source(model), Target(), sources)
    (problem,) = made_plan.problems
    assert problem.severity == "warning"
    assert str(problem) == (
        "model.layers.0-2.self_attn.k_proj, model.layers.0-2.self_attn.q_proj, "
        "model.layers.0-2.self_attn.v_proj: its shards are of several sources, each with its own "
        "scale; on compute capability 12.x SGLang rounds them all again, to the largest scale; use "
        "method: fp8_channel there"
    )
    assert not resolve_plan(loaded, open_source(model), CPU, sources).problems
