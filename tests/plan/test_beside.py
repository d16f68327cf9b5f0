"""Tensors beside a weight, and what config.json does to a checkpoint: understood, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.compose.stream import VirtualCheckpoint
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.plan.resolve import resolve_plan
from tests.checkpoint.peers import peer_checkpoint
from tests.checkpoints import write_checkpoint, write_llama
from tests.commands import run
from tests.presets import plan, preset
from tests.quantize.peers import LAYERS, config, numpy_layer, original
from tests.reference.dequantize import dequantize_checkpoint

NAME = LAYERS[0]
AWQ, GPTQ, PACKED = "autoawq-g64", "gptqmodel-gptq-g64", "llmcompressor-w4a16-g64"
FP8, INT8, BLOCKS = "llmcompressor-fp8-dynamic", "autoround-int8", "llmcompressor-fp8-block"
RULES = ("method: bf16", "method: auto", "method: fp8, requantize: true")


def with_tensors(folder: Path, peer: str, **beside: torch.Tensor) -> Path:
    """A peer's checkpoint with tensors beside its first layer's; `__` stands for a dot."""
    model = peer_checkpoint(folder, peer)
    tensors = load_file(model / "model.safetensors")
    tensors |= {f"{NAME}.{suffix.replace('__', '.')}": t for suffix, t in beside.items()}
    (model / "model.safetensors").unlink()
    save_file(tensors, model / "model.safetensors")
    return model


def errors(model: Path, rule: str) -> list[str]:
    made = plan(model, f'match: "*_proj", {rule}')
    return [str(problem) for problem in made.errors]


@pytest.mark.parametrize("peer", ["bf16", AWQ, GPTQ, PACKED, FP8, INT8, BLOCKS])
@pytest.mark.parametrize(
    "suffix",
    ["smooth_scale", "act_scales", "weight_offset", "bias_scale", "rotation", "lora_A", "weight_g"],
)
def test_a_tensor_that_nobody_knows_is_refused_by_name(
    tmp_path: Path, peer: str, suffix: str
) -> None:
    model = with_tensors(tmp_path / "model", peer, **{suffix: torch.ones(576)})
    for rule in RULES:
        (text,) = errors(model, rule)
        assert text.startswith(f"{NAME}: is stored as ")
        assert f"this release does not know the {suffix} beside it" in text
    assert f"{NAME}: this release does not know the {suffix}" in run("inspect", model)[1]


@pytest.mark.parametrize(("peer", "suffix"), [(AWQ, "g_idx"), (GPTQ, "weight"), (FP8, "g_idx")])
def test_a_tensor_of_another_format_is_refused_by_name(
    tmp_path: Path, peer: str, suffix: str
) -> None:
    model = with_tensors(tmp_path / "model", peer, **{suffix: torch.ones(576)})
    assert f" {suffix} beside it" in errors(model, "method: bf16")[0]


@pytest.mark.parametrize("below", ["lora_A__weight", "R4_input__weight", "lora_A__x__weight"])
@pytest.mark.parametrize("peer", ["bf16", GPTQ])
def test_a_layer_below_a_layer_is_refused_by_name(tmp_path: Path, peer: str, below: str) -> None:
    model = with_tensors(tmp_path / "model", peer, **{below: torch.ones(8, 576)})
    texts = errors(model, "method: bf16")
    assert f"does not know the {below.replace('__', '.').rpartition('.')[0]} below it" in texts[0]


@pytest.mark.parametrize("peer", ["bf16", GPTQ, FP8])
@pytest.mark.parametrize("suffix", ["bias", "k_scale", "v_scale", "output_scale"])
def test_tensors_that_leave_a_weight_what_it_is_are_no_error(
    tmp_path: Path, peer: str, suffix: str
) -> None:
    model = with_tensors(tmp_path / "model", peer, **{suffix: torch.ones(192)})
    assert errors(model, "method: bf16") == []


class TestPreQuantScale:
    @staticmethod
    def write(folder: Path, peer: str) -> tuple[Path, torch.Tensor]:
        torch.manual_seed(0)
        factor = torch.randn(576).exp().bfloat16()
        return with_tensors(folder, peer, pre_quant_scale=factor), factor.float()

    @pytest.mark.parametrize("peer", ["bf16", GPTQ, PACKED, FP8, INT8, BLOCKS])
    def test_is_taken_into_the_weight(self, tmp_path: Path, peer: str) -> None:
        model, factor = self.write(tmp_path / "model", peer)
        made = plan(model, 'match: "*_proj", method: bf16')
        assert not made.errors
        stream = dict(iter(VirtualCheckpoint(made)))
        assert f"{NAME}.pre_quant_scale" not in stream
        own = original(NAME) if peer == "bf16" else torch.from_numpy(
            dequantize_checkpoint(numpy_layer(peer, NAME), config(peer))
        )  # fmt: skip
        expected = (own.float() * factor).bfloat16()
        assert torch.equal(stream[f"{NAME}.weight"], expected)

    @pytest.mark.parametrize("rule", ["method: fp8_channel", "method: auto"])
    def test_is_not_dropped_and_the_remedies_work(self, tmp_path: Path, rule: str) -> None:
        model, _ = self.write(tmp_path / "model", FP8)
        text = errors(model, rule)[0]
        assert "is stored as fp8 per channel (float-quantized) with pre_quant_scale" in text
        assert "match it with method: bf16 to dequantize it" in text
        assert errors(model, "method: bf16") == []
        if rule != "method: auto":
            assert "or write requantize: true" in text
            assert errors(model, f"{rule}, requantize: true") == []

    def test_floats_are_quantized_with_it(self, tmp_path: Path) -> None:
        model, factor = self.write(tmp_path / "model", "bf16")
        made = plan(model, 'match: "*_proj", method: fp8_channel')
        stream = dict(iter(VirtualCheckpoint(made)))
        own = load_file(model / "model.safetensors")[f"{NAME}.weight"].float() * factor
        served = stream[f"{NAME}.weight"].float() * stream[f"{NAME}.weight_scale"]
        assert float((served - own).norm() / own.norm()) < 0.03

    def test_of_another_shape_is_refused(self, tmp_path: Path) -> None:
        model = with_tensors(tmp_path / "model", FP8, pre_quant_scale=torch.ones(192))
        assert "the pre_quant_scale beside it" in errors(model, "method: bf16")[0]


def transform(*locations: str, target: str = "re:.*k_proj$", **more: Any) -> dict[str, Any]:
    steps = [{"targets": [target], "location": location} for location in locations]
    return {"config_groups": {"R4": {"type": "hadamard", "apply": steps, **more}}}


def test_a_matrix_of_no_step_is_refused_by_name(tmp_path: Path) -> None:
    model = peer_checkpoint(
        tmp_path / "model", PACKED, transform_config=transform("input", target="re:.*v_proj$")
    )
    tensors = load_file(model / "model.safetensors")
    tensors[f"{NAME}.R4_input.weight"] = torch.eye(576)
    (model / "model.safetensors").unlink()
    save_file(tensors, model / "model.safetensors")
    found = [error for error in errors(model, "method: bf16") if NAME in error]
    assert "this release does not know the R4_input.weight below it" in found[0]


REFUSED = [
    ({"transform_config": transform("input", "weight_input")},
     "transform_config of config.json transforms it by 'R4' as it runs (input)"),
    ({"transform_config": transform("output", target="Linear")},
     "transform_config of config.json transforms it by 'R4' as it runs (output)"),
    ({"transform_config": transform("input", target=NAME)}, "by 'R4' as it runs (input)"),
    ({"transform_config": transform("elsewhere")}, "by 'R4' as it runs (elsewhere)"),
    ({"transform_config": {"config_groups": {"R1": 7}}}, "by 'R1' as it runs (?)"),
    ({"transform_config": transform("input")}, "its matrix [576, 576] is not stored"),
    ({"transform_config": transform("input", type="cayley")}, "its type 'cayley' is not known"),
    ({"transform_config": transform("input", type=["hadamard"])}, "by 'R4' as it runs (?)"),
    ({"transform_config": transform("input", type="random-matrix", head_dim=64)},
     "its matrix [64, 64] is not stored"),
    ({"transform_config": transform("input", head_dim=128)}, "its head_dim 128 does not divide"),
    ({"transform_config": transform("input", head_dim="64")}, "its head_dim '64' does not"),
    ({"transform_config": transform("input", head_dim=64, randomize=True)}, "not store which"),
    ({"transform_config": transform("input", head_dim=64, requires_grad=True)}, "is not stored"),
    ({"transform_config": transform("input", "input", head_dim=64)}, "another one transforms"),
    ({"transform_config": transform("input", target="re:.*self_attn$")}, "only what layers are"),
    ({"transform_config": transform("input", target="LlamaAttention")}, "only what layers are"),
    ({"transform_config": transform("q_attn", target="re:.*self_attn$")}, "as it runs (q_attn)"),
    ({"transform_config": transform("q_attn", "k_cache", target="re:.*", type="random-matrix")},
     "as it runs (q_attn)"),
    ({"rotation": "hadamard"}, "rotation in its quantization_config"),
    ({"meta": {"rotation": "random"}}, "meta.rotation in its quantization_config"),
    ({"algo_config": [{"name": "quarot", "r1": True}]}, "algo_config.name in its"),
    ({"online_rotation_layers": ["down_proj"]}, "online_rotation_layers in its"),
    ({"hadamard_group_size": 32}, "hadamard_group_size in its"),
    ({"sparsity_config": {"format": "sparse-24-bitmask", "targets": ["Linear"]}},
     "sparsity_config of config.json stores it as sparse-24-bitmask"),
]  # fmt: skip
HARMLESS = [
    {"transform_config": {}},
    {"transform_config": None},
    {"transform_config": transform("weight_input", "weight_output")},
    {"transform_config": transform("q_attn", "k_cache", target="re:.*")},
    {"transform_config": transform("input", target="re:.*down_proj$")},
    {"transform_config": transform("input", "weight_input", head_dim=64)},
    {"rotation": None, "meta": {"rotation": False, "fallback": {"smooth": None}}},
    {"rotation": "none"},
    {"sparsity_config": {}},
    {"sparsity_config": {"format": "dense", "targets": ["Linear"]}},
    {"sparsity_config": {"format": "sparse-bitmask", "targets": ["Linear"], "ignore": [NAME]}},
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("changes", "text"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_changes_a_layer_as_it_runs_is_refused(
    tmp_path: Path, rule: str, changes: dict[str, Any], text: str
) -> None:
    model = peer_checkpoint(tmp_path / "model", PACKED, **changes)
    found = [error for error in errors(model, rule) if NAME in error]
    assert found
    assert text in found[0]


@pytest.mark.parametrize("changes", HARMLESS, ids=lambda value: str(value)[:60])
def test_what_leaves_a_layer_what_it_is_is_read(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = peer_checkpoint(tmp_path / "model", PACKED, **changes)
    texts = [error for error in errors(model, "method: bf16") if NAME in error]
    assert texts == []


RANDOM, PLAIN = (transform("weight_input", randomize=is_random) for is_random in (True, False))


@pytest.mark.parametrize(
    ("theirs", "ours", "fits"),
    [
        (transform("weight_input"), None, False),
        (None, transform("weight_input"), False),
        (transform("weight_input"), transform("weight_input"), True),
        (RANDOM, RANDOM, False),
        (PLAIN, PLAIN, True),
    ],
)  # fmt: skip
def test_layers_of_two_rotations_are_not_mixed(
    tmp_path: Path, theirs: Any, ours: Any, fits: bool
) -> None:
    made = {}
    for name, said in (("model", ours), ("other", theirs)):
        config = {"quantization_config": {"transform_config": said}} if said else {}
        made[name] = open_source(write_llama(tmp_path / name, **config), name)
    path = json.dumps(str(tmp_path / "other"))
    rules = preset(tmp_path / "presets", 'match: "*.o_proj", method: bf16, source: other',
                   head=f"sources: {{other: {{path: {path}}}}}\n")  # fmt: skip
    found = resolve_plan(rules, made["model"], Target(), {"other": made["other"]}).errors
    assert (
        not found
        if fits
        else "transform_config in its config.json rotates its weights" in str(found[0])
    )


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
class TestRemediesOfAnotherFormat:
    def errors(self, model: Path, rule: str, dtype: str) -> list[str]:
        made = plan(model, f'match: "*_proj", {rule}', target=Target(dtype=dtype))
        return [str(problem) for problem in made.errors]

    def test_what_no_method_serves(self, tmp_path: Path, dtype: str) -> None:
        model = peer_checkpoint(tmp_path / "model", PACKED)
        (text,) = self.errors(model, "method: fp8", dtype)
        bf16 = {"BF16": "method: bf16", "F16": "method: unquantized"}[dtype]
        assert text.endswith(
            "which no method serves as it is; match it with method: auto to serve it as it is, "
            f"{bf16} to dequantize it, or write requantize: true"
        )
        for rule in ("method: auto", bf16, "method: fp8, requantize: true"):
            assert self.errors(model, rule, dtype) == []

    def test_another_method(self, tmp_path: Path, dtype: str) -> None:
        model = peer_checkpoint(tmp_path / "model", AWQ)
        (text,) = self.errors(model, "method: fp8", dtype)
        bf16 = {"BF16": "method: bf16", "F16": "method: unquantized"}[dtype]
        assert text.endswith(
            f"write method: awq with group_size: 64, {bf16.removeprefix('method: ')} to dequantize "
            "it, or requantize: true to have it in fp8 with a second rounding"
        )
        for rule in ("method: awq, group_size: 64", bf16, "method: fp8, requantize: true"):
            assert self.errors(model, rule, dtype) == []


@pytest.mark.parametrize(
    ("peer", "rule", "remedy", "way"),
    [
        (AWQ, "method: awq", "write group_size: 64", "method: awq, group_size: 64"),
        (GPTQ, "method: gptq_int8, group_size: 64", "write method: gptq with group_size: 64, "
         "desc_act: false", "method: gptq, group_size: 64, desc_act: false"),
    ],
)  # fmt: skip
def test_other_arguments_are_told_as_a_preset_takes_them(
    tmp_path: Path, peer: str, rule: str, remedy: str, way: str
) -> None:
    model = peer_checkpoint(tmp_path / "model", peer)
    cpu = Target(device="cpu")
    (problem,) = plan(model, f'match: "*_proj", {rule}', target=cpu).errors
    assert str(problem).endswith(f"; {remedy}")
    assert plan(model, f'match: "*_proj", {way}', target=cpu).errors == ()


def test_one_scale_is_no_block_and_its_remedy_is_yaml(tmp_path: Path) -> None:
    model = peer_checkpoint(tmp_path / "model", "bf16")
    weight = torch.zeros(192, 576).to(torch.float8_e4m3fn)
    save_file({f"{NAME}.weight": weight, f"{NAME}.weight_scale": torch.ones(())},
              model / "other.safetensors")  # fmt: skip
    (model / "other.safetensors").replace(model / "model.safetensors")
    (problem,) = plan(model, 'match: "*_proj", method: fp8_block').errors
    assert str(problem).endswith("not with weight_block_size: [128, 128]; write method: fp8")
    assert plan(model, 'match: "*_proj", method: fp8').errors == ()


class TestScaledActivations:
    """AutoAWQ's `ScaledActivation` divides what down_proj reads by its `scales`."""

    def test_are_refused_by_name(self, tmp_path: Path) -> None:
        config = {"torch_dtype": "bfloat16", "quantization_config": {"quant_method": "awq"}}
        name = "model.layers.0.mlp.act"
        model = write_checkpoint(tmp_path / "model", config, {f"{name}.scales": torch.ones(64)})
        (problem,) = plan(model, 'match: "*", method: auto').errors
        assert str(problem).startswith(f"{name}: is stored as scales, and an activation is divided")


class TestLayersThatAreNeverQuantized:
    HEAD = "lm_head"

    def write(self, folder: Path) -> tuple[Path, torch.Tensor]:
        model = write_llama(folder, tie_word_embeddings=False)
        tensors = load_file(model / "model.safetensors")
        weight = tensors.pop(f"{self.HEAD}.weight").float()
        scale = weight.abs().amax(1, keepdim=True) / 448
        codes = (weight / scale).to(torch.float8_e4m3fn)
        tensors |= {f"{self.HEAD}.weight": codes, f"{self.HEAD}.weight_scale": scale}
        (model / "model.safetensors").unlink()
        save_file(tensors, model / "model.safetensors")
        return model, codes.float() * scale

    def test_a_quantized_lm_head_is_dequantized_as_its_error_says(self, tmp_path: Path) -> None:
        model, weight = self.write(tmp_path / "model")
        (problem,) = plan(model, 'match: "*_proj", method: fp8').errors
        assert str(problem) == (
            "lm_head: is stored as fp8 per channel: few methods serve lm_head, and only where a "
            "rule spells its name; match it with method: bf16 to dequantize it"
        )
        made = plan(model, f"match: {self.HEAD}, method: bf16", target=Target(tp_size=3))
        assert [p for p in made.errors if self.HEAD in p.where] == []
        stream = dict(iter(VirtualCheckpoint(plan(model, f"match: {self.HEAD}, method: bf16"))))
        assert torch.equal(stream[f"{self.HEAD}.weight"], weight.bfloat16())

    @pytest.mark.parametrize("method", ["auto", "fp8_channel"])
    def test_no_other_method_takes_it(self, tmp_path: Path, method: str) -> None:
        model, _ = self.write(tmp_path / "model")
        assert plan(model, f"match: {self.HEAD}, method: {method}").errors
