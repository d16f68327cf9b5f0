"""Experts under `method: auto`: what each becomes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.compose.stream import VirtualCheckpoint
from mixedprec_plugin.methods.cards import find_gpu
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.plan.model import Plan
from mixedprec_plugin.plan.resolve import resolve_plan
from tests.checkpoint.peer_experts import MODULE, NUM_EXPERTS, write_experts
from tests.checkpoint.peers import FOLDERS
from tests.checkpoint.test_formats import DETECTED
from tests.checkpoints import write_checkpoint
from tests.plan.test_auto import NO_CLASS
from tests.presets import plan, preset, problem_texts
from tests.tensors import same_bytes

CPU = Target(device="cpu")
AUTO = 'match: "*", method: auto'
W4A16, FP8 = "llmcompressor-w4a16-g64", "llmcompressor-fp8-dynamic"
ASYMMETRIC = "llmcompressor-w4a16-asym-g64"
ALIKE = (
    f"{MODULE}: under method: auto SGLang's class runs all experts of a layer alike: they need one "
    "source and one stored format, got "
)
REMEDY = "; take all of them from one source, or name a method for all of them"


@pytest.mark.parametrize("peer", FOLDERS)
def test_every_tensor_passes_as_stored_to_cuda(tmp_path: Path, peer: str) -> None:
    model = write_experts(tmp_path / "model", peer)
    made = plan(model, AUTO)
    if peer == ASYMMETRIC:
        texts = [problem.what for problem in made.errors]
        assert texts == ["SGLang reads the zero points of such experts as if they were AWQ's"]
        return
    if peer in NO_CLASS:
        (problem,) = made.errors
        assert str(problem).endswith(NO_CLASS[peer])
        return
    assert not made.errors
    (group,) = made.expert_groups[MODULE]
    assert group.experts == tuple(range(NUM_EXPERTS))
    assert group.scheme.method == ("bf16" if peer == "bf16" else "auto")
    stream = dict(iter(VirtualCheckpoint(made)))
    stored = load_file(model / "model.safetensors")
    assert all(name.endswith(".g_idx") for name in stream.keys() - stored.keys())
    for name, tensor in stored.items():
        assert same_bytes(stream[name], tensor), name


@pytest.mark.parametrize("peer", FOLDERS)
def test_cpu_runs_our_methods_as_themselves_and_dequantizes_the_rest(
    tmp_path: Path, peer: str
) -> None:
    made = plan(write_experts(tmp_path / "model", peer), AUTO, target=CPU)
    assert not made.errors
    layer = made.by_name[f"{MODULE}.0.up_proj"]
    ours = DETECTED[peer][0]
    if ours:
        assert (layer.method, layer.action) == (ours, "as stored")
        return
    assert (layer.method, layer.action) == ("bf16", "dequantize")
    notes = [text for text in problem_texts(made) if "dequantized here" in text]
    assert notes
    on_cuda = [text.partition("; on CUDA it runs as stored")[2] for text in notes]
    assert all(x.endswith("if SGLang has a kernel for such experts") for x in on_cuda if x)
    assert all(bool(x) == (peer not in NO_CLASS) for x in on_cuda)


def test_experts_that_a_source_leaves_unquantized_stay_so(tmp_path: Path) -> None:
    model = write_experts(
        tmp_path / "model", W4A16, lambda layer, _: W4A16 if layer else "bf16", num_layers=2,
        ignore=["re:model.layers.0.*"],
    )  # fmt: skip
    made = plan(model, AUTO)
    assert not made.errors
    methods = {module: [g.scheme.method for g in groups] for module, groups in
               made.expert_groups.items()}  # fmt: skip
    assert methods == {MODULE: ["bf16"], MODULE.replace("0", "1"): ["auto"]}


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_experts_of_two_formats_in_one_layer_are_an_error(tmp_path: Path, device: Any) -> None:
    model = write_experts(
        tmp_path / "model", "autoawq-g64", lambda _, e: "autoawq-g64" if e else "bf16"
    )
    errors = plan(model, AUTO, target=Target(device=device)).errors
    (problem,) = [problem for problem in errors if problem.rule == "mixed-experts"]
    assert str(problem) == (
        f"{ALIKE}bfloat16 of 'model' for expert 0, awq 4-bit group 64 of 'model' for experts 1, 2, "
        f"3{REMEDY}"
    )


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_named_method_beside_quantized_experts_under_auto_is_an_error(
    tmp_path: Path, device: Any
) -> None:
    model = write_experts(tmp_path / "model", "autoawq-g64")
    rule = f'match: "{MODULE}.3.*", method: bf16'
    (problem,) = plan(model, AUTO, rule, target=Target(device=device)).errors
    assert str(problem) == (
        f"{ALIKE}awq 4-bit group 64 of 'model' for experts 0, 1, 2, method bf16 for expert 3"
        f"{REMEDY}"
    )


def test_named_method_beside_unquantized_experts_under_auto_is_none(tmp_path: Path) -> None:
    model = write_experts(tmp_path / "model", "bf16")
    made = plan(model, AUTO, f'match: "{MODULE}.3.*", method: fp8')
    assert not made.errors
    assert [g.scheme.method for g in made.expert_groups[MODULE]] == ["bf16", "fp8"]


def test_activations_that_the_config_says_otherwise_of_one_expert_are_an_error(
    tmp_path: Path,
) -> None:
    """compressed-tensors' class in SGLang would ask for the first expert alone."""
    groups = json.loads(json.dumps(_groups(FP8)))
    groups["group_1"] = json.loads(json.dumps(groups["group_0"]))
    groups["group_1"]["input_activations"]["dynamic"] = False
    groups["group_1"]["targets"] = ["re:.*experts.3.*"]
    groups = {"group_1": groups["group_1"], "group_0": groups["group_0"]}
    model = write_experts(tmp_path / "model", FP8, config_groups=groups)
    (problem,) = [p for p in plan(model, AUTO).errors if p.rule == "mixed-experts"]
    assert "with activations dynamic True, group_size None for experts 0, 1, 2, " in problem.what
    assert problem.what.endswith("with activations dynamic False, group_size None for expert 3")


def _groups(peer: str) -> dict[str, Any]:
    from tests.checkpoint.peers import quantization_config

    groups: dict[str, Any] = quantization_config(peer)["config_groups"]
    return groups


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_projections_of_one_expert_from_two_sources_are_an_error(
    tmp_path: Path, device: Any
) -> None:
    made = _two_sources(tmp_path, 'match: "*.up_proj", method: auto, source: other', device)
    (problem,) = made.errors
    assert str(problem) == (
        f"{MODULE}.0-3: under method: auto its shards need one source and one stored format, got "
        "awq 4-bit group 64 of 'model' for gate_proj, awq 4-bit group 64 of 'other' for up_proj, "
        f"awq 4-bit group 64 of 'model' for down_proj{REMEDY}"
    )


def test_experts_of_two_sources_in_one_layer_are_an_error(tmp_path: Path) -> None:
    made = _two_sources(tmp_path, f'match: "{MODULE}.2.*", method: auto, source: other', "cuda")
    (problem,) = made.errors
    assert str(problem) == (
        f"{ALIKE}awq 4-bit group 64 of 'model' for experts 0, 1, 3, awq 4-bit group 64 of 'other' "
        f"for expert 2{REMEDY}"
    )


def _two_sources(tmp_path: Path, rule: str, device: Any) -> Plan:
    model = write_experts(tmp_path / "model", "autoawq-g64")
    other = write_experts(tmp_path / "other", "autoawq-g64")
    made = preset(
        tmp_path / "presets", AUTO, rule,
        head=f"trust_sources: true\nsources: {{other: {{path: {json.dumps(str(other))}}}}}\n",
    )  # fmt: skip
    sources = {"other": open_source(other, "other")}
    return resolve_plan(made, open_source(model), Target(device=device), sources)


def test_what_is_known_by_name_only_is_refused_on_the_cpu(tmp_path: Path) -> None:
    config = {"torch_dtype": "bfloat16", "quantization_config": {"quant_method": "w4afp8"}}
    expert = f"{MODULE}.0.up_proj"
    tensors = {f"{expert}.W_q": torch.zeros(8, 8, dtype=torch.uint8)}
    model = write_checkpoint(tmp_path / "model", config, tensors)
    (problem,) = plan(model, AUTO, target=CPU).errors
    assert str(problem).startswith(f"{expert}: is stored as hqq, which the CPU platform")
    assert "name another method or source for it to try the rest" in str(problem)
    assert not plan(model, AUTO).errors


@pytest.mark.parametrize("peer", ["llmcompressor-fp8-block", FP8])
def test_gpu_without_e4m3_refuses_fp8_experts(tmp_path: Path, peer: str) -> None:
    model = write_experts(tmp_path / "model", peer)
    for name, refuses in (("A100", True), ("H100", False)):
        made = plan(model, AUTO, target=Target(gpu=find_gpu(name)))
        assert bool(made.errors) == refuses
        assert {problem.rule for problem in made.errors} <= {"gpu"}


def test_shape_that_gptqs_kernel_does_not_take_is_refused(tmp_path: Path) -> None:
    """SGLang's class does not ask; a rank's 32 features are half a group."""
    model = write_experts(tmp_path / "model", "autoround-gptq-g64")
    assert not plan(model, AUTO, target=Target(tp_size=8)).errors
    assert plan(model, AUTO, target=Target(tp_size=16)).errors
