from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.compose.stream import VirtualCheckpoint
from mixedprec_plugin.errors import CheckpointError
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.methods.stored import TensorSpec
from mixedprec_plugin.plan.model import Plan
from mixedprec_plugin.plan.resolve import resolve_plan
from tests.checkpoint.peers import FOLDERS, peer_checkpoint
from tests.checkpoint.test_formats import DETECTED
from tests.checkpoints import llama_config, llama_tensors, write_checkpoint, write_llama
from tests.commands import run_without_torch
from tests.presets import plan, preset, problem_texts, write_preset
from tests.quantize.peers import FILE, LAYERS, PEERS, torch_layer
from tests.tensors import same_bytes

CPU = Target(device="cpu")
AUTO = 'match: "*_proj", method: auto'
# SGLang's own words for the two are in tests/dryrun/test_auto.py
NO_CLASS = {
    "gptqmodel-asym-g64": "which take 4 or 8 bits, symmetric, group_size 32, 64, 128 or -1; "
    "config.json says bits 4, group_size 64, sym False; match it with method: bf16 to dequantize "
    "it",
    "gptqmodel-fp8-row": "SGLang's class for 'fp8' needs activation_scheme in quantization_config; "
    "match it with method: bf16 to dequantize it",
}
BOTH = "model.layers.0.self_attn.k_proj, model.layers.0.self_attn.v_proj"


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_tensor_passes_as_stored_to_cuda(tmp_path: Path, folder: str) -> None:
    made = plan(peer_checkpoint(tmp_path / "model", folder), AUTO)
    if folder in NO_CLASS:
        (problem,) = made.errors
        assert str(problem).endswith(NO_CLASS[folder])
        return
    assert all("scales are rounded" in text for text in problem_texts(made))
    stream = dict(iter(VirtualCheckpoint(made)))
    for name in LAYERS:
        layer = made.by_name[name]
        assert layer.action == "as stored"
        assert layer.scheme is not None
        assert layer.scheme.label == "auto"
        assert layer.method == ("bf16" if folder == "bf16" else "auto")
        stored = torch_layer(folder, name)
        assert layer.outputs.keys() - stored.keys() <= {"g_idx"}
        for suffix, tensor in stored.items():
            assert same_bytes(stream[f"{name}.{suffix}"], tensor)


def test_missing_group_index_is_in_order_under_auto_too(tmp_path: Path) -> None:
    stream = dict(iter(VirtualCheckpoint(plan(
        peer_checkpoint(tmp_path / "model", "autoround-native-g64"), AUTO))))  # fmt: skip
    theirs = torch_layer("autoround-gptq-g64", LAYERS[0])["g_idx"]
    assert torch.equal(stream[f"{LAYERS[0]}.g_idx"], theirs)


def test_gptq_values_that_kernels_do_not_read_are_refused_under_auto_too(tmp_path: Path) -> None:
    model = peer_checkpoint(tmp_path / "model", "gptqmodel-gptq-g64")
    tensors = load_file(PEERS / "gptqmodel-gptq-g64" / FILE)
    tensors[f"{LAYERS[0]}.qzeros"] += 1
    (model / "model.safetensors").unlink()
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(CheckpointError, match="k_proj: its zero points are not all 8"):
        dict(iter(VirtualCheckpoint(plan(model, AUTO))))


@pytest.mark.parametrize("folder", [f for f in FOLDERS if DETECTED[f][0] not in ("", "bf16")])
def test_cpu_runs_our_methods_as_themselves(tmp_path: Path, folder: str) -> None:
    made = plan(peer_checkpoint(tmp_path / "model", folder), AUTO, target=CPU)
    layer = made.by_name[LAYERS[0]]
    assert (layer.method, layer.action) == (DETECTED[folder][0], "as stored")
    foreseen = ("does not run on CUDA", "its float16 scales are rounded to bfloat16")
    assert all(any(text in t for text in foreseen) for t in problem_texts(made))


@pytest.mark.parametrize("folder", [f for f in FOLDERS if DETECTED[f][0] == ""])
def test_cpu_dequantizes_the_rest_and_the_plan_says_so(tmp_path: Path, folder: str) -> None:
    made = plan(peer_checkpoint(tmp_path / "model", folder), AUTO, target=CPU)
    layer = made.by_name[LAYERS[0]]
    assert (layer.method, layer.action) == ("bf16", "dequantize")
    assert layer.outputs == {"weight": TensorSpec("BF16", (192, 576))}
    is_weight_only = folder.startswith("gptqmodel") or "w4a16" in folder or "nvfp4" in folder
    activations = "" if is_weight_only else ", with quantized activations"
    on_cuda = "" if folder in NO_CLASS else f"; on CUDA it runs as stored{activations}"
    assert problem_texts(made) == [
        f"warning: {BOTH}: is dequantized here: no method of the CPU platform runs "
        f"{DETECTED[folder][3]}{on_cuda}"
    ]


def test_what_is_known_by_name_only_runs_on_cuda_and_not_on_the_cpu(tmp_path: Path) -> None:
    model = peer_checkpoint(tmp_path / "model", "bf16", quant_method="w4afp8")
    tensors = load_file(PEERS / "bf16" / FILE)
    tensors[f"{LAYERS[0]}.weight"] = torch.zeros(9, 1, dtype=torch.uint8)
    tensors[f"{LAYERS[0]}.absmax"] = torch.zeros(9)
    (model / "model.safetensors").unlink()
    save_file(tensors, model / "model.safetensors")
    made = plan(model, AUTO)
    assert not made.errors
    assert made.by_name[LAYERS[0]].outputs["absmax"] == TensorSpec("F32", (9,))
    (problem,) = plan(model, AUTO, target=CPU).errors
    assert str(problem) == (
        f"{LAYERS[0]}: is stored as U8 weights with absmax, weight, which the CPU platform "
        "does not read; name another method or source for it to try the rest"
    )


def test_e5m2_is_no_format_of_sglangs(tmp_path: Path) -> None:
    # its parameters are e4m3's, whose largest number is 448
    config = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    model = peer_checkpoint(tmp_path / "model", "bf16", **config)
    tensors = load_file(PEERS / "bf16" / FILE)
    for name in LAYERS:
        codes = tensors[f"{name}.weight"].to(torch.float8_e5m2)
        tensors |= {f"{name}.weight": codes, f"{name}.weight_scale": torch.ones(1)}
    (model / "model.safetensors").unlink()
    save_file(tensors, model / "model.safetensors")
    (problem,) = plan(model, AUTO).errors
    assert str(problem).endswith(
        "is stored as fp8 e5m2 per tensor, and SGLang's classes hold FP8 weights in e4m3; match "
        "it with method: bf16 to dequantize it"
    )
    assert not plan(model, AUTO.replace("auto", "bf16")).errors


def test_config_that_the_tensors_contradict_is_an_error_where_sglang_goes_by_it(
    tmp_path: Path,
) -> None:
    model = peer_checkpoint(tmp_path / "model", "autoawq-g64", group_size=128)
    (problem,) = plan(model, AUTO).errors
    assert str(problem) == (
        f"{BOTH}: is stored with group_size 64, config.json says 128, which method: auto would go "
        "by; correct config.json, or name the layer's method"
    )


def two_sources(tmp_path: Path, rules: list[str], stored: dict[str, Any], **target: Any) -> Plan:
    """A bf16 Llama and a source `other` that stores attention in FP8."""
    model = write_llama(tmp_path / "model")
    tensors = llama_tensors(llama_config())
    for name in [n for n in tensors if "_proj" in n and "self_attn" in n]:
        weight = tensors.pop(name)
        tensors[name] = weight.to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"] = torch.ones(())
    config = llama_config(quantization_config={"quant_method": "fp8", **stored})
    other = write_checkpoint(tmp_path / "other", config, tensors)
    head = f"sources: {{other: {{path: {json.dumps(str(other))}}}}}\n"
    made = preset(tmp_path / "presets", *rules, head=head)
    sources = {"other": open_source(other, "other")}
    return resolve_plan(made, open_source(model), Target(**target), sources)


def test_shards_of_one_source_are_one_scheme(tmp_path: Path) -> None:
    rule = 'match: "*.self_attn.*", method: auto, source: other'
    made = two_sources(tmp_path, [rule], {"activation_scheme": "dynamic"})
    assert not made.problems
    q = made.by_name["model.layers.0.self_attn.q_proj"]
    assert q.scheme is not None
    assert dict(q.scheme.arguments) == {"source": "other", "stored": "fp8 per tensor"}
    assert q.outputs["weight_scale"] == TensorSpec("F32", ())
    assert made.by_name["model.layers.0.mlp.up_proj"].method == "bf16"


def test_shards_in_a_format_that_is_not_read_differ_in_their_shapes_only(tmp_path: Path) -> None:
    """SGLang's class says what it makes of such scales; they are of one kind."""
    config = llama_config(quantization_config={"quant_method": "w8a8_fp8"})
    tensors = llama_tensors(config)
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        N, K = tensors[name].shape
        tensors[name] = torch.zeros(N, K).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"] = torch.ones(1, N)
    made = plan(write_checkpoint(tmp_path / "model", config, tensors), AUTO)
    assert not made.errors
    scheme = made.by_name["model.layers.0.self_attn.k_proj"].scheme
    assert scheme is not None
    assert scheme.arguments["stored"] == "fp8 with weight_scale, which fits no usual block size"


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("head", ["", "on_fused_conflict: highest\n"])
def test_shards_of_two_sources_under_auto_are_an_error(
    tmp_path: Path, device: str, head: str
) -> None:
    rules = ['match: "*_proj", method: auto, source: other', 'match: "*.q_proj", method: auto']
    made = two_sources(tmp_path, rules, {}, device=device)
    assert str(made.errors[0]) == (
        "model.layers.0-2.self_attn.qkv_proj: under method: auto its shards need one source and "
        "one stored format, got bfloat16 of 'model' for q_proj, fp8 per tensor of 'other' for "
        "k_proj, fp8 per tensor of 'other' for v_proj; take all of them from one source, or name a "
        "method for all of them"
    )


def test_auto_beside_a_named_method_in_one_fused_module_is_an_error(tmp_path: Path) -> None:
    rules = ['match: "*", method: fp8', 'match: "*.k_proj", method: auto, source: other']
    made = two_sources(tmp_path, rules, {"activation_scheme": "dynamic"})
    (problem,) = made.errors
    assert "got method fp8 for q_proj, fp8 per tensor of 'other' for k_proj, method" in problem.what


def test_auto_leaves_what_is_never_quantized_alone(tmp_path: Path) -> None:
    made = plan(write_llama(tmp_path / "model"), 'match: "*", method: auto', 'match: "lm_head", '
                "method: auto")  # fmt: skip
    assert not made.errors
    assert {layer.action for layer in made.layers} == {"as stored"}


def test_auto_is_planned_without_torch_or_sglang(tmp_path: Path) -> None:
    model = peer_checkpoint(tmp_path / "model", "llmcompressor-w8a8-int8")
    rules = write_preset(tmp_path, AUTO)
    shown = run_without_torch("plan", "--model", model, "--preset", rules)
    row = next(line for line in shown.splitlines() if "k_proj" in line)
    assert row.split()[:4] == ["model.layers.0.self_attn.k_proj", "auto", "auto", "int8"]


def test_auto_takes_no_arguments(tmp_path: Path) -> None:
    from mixedprec_plugin.errors import PresetError

    with pytest.raises(PresetError, match="bits"):
        preset(tmp_path, 'match: "*", method: auto, bits: 4')
    with pytest.raises(PresetError, match=r"requantize: true is not false"):
        preset(tmp_path, 'match: "*", method: auto, requantize: true')
