"""gpt-oss as it is released: planned by its headers, its experts taken apart, and put together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mixedprec_plugin.checkpoint.reader import Reader, Reading
from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.compose.stream import VirtualCheckpoint
from mixedprec_plugin.methods.cards import find_gpu
from mixedprec_plugin.methods.interface import Target
from tests.checkpoints import write_gpt_oss
from tests.commands import converted, run
from tests.presets import plan, write_preset
from tests.published import gpt_oss_20b

EXPERTS = "model.layers.1.mlp.experts"
# `metadata.total_size` of its model.safetensors.index.json, and how many tensors that names
TOTAL_SIZE, NUM_TENSORS = 13761264768, 459
ATTENTION = 'match: "*.self_attn.*", method: fp8'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gpt_oss(tmp_path_factory.mktemp("gpt_oss") / "model")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = gpt_oss_20b()
    assert len(made.tensors) == NUM_TENSORS
    return made.write(tmp_path_factory.mktemp("published") / "gpt-oss-20b")


@pytest.mark.parametrize("method", ["mxfp4", "auto"])
def test_the_published_model_is_planned_byte_for_byte(published: Path, method: str) -> None:
    target = Target(gpu=find_gpu("H100"))
    made = plan(published, f'match: "*.experts.*", method: {method}', ATTENTION, target=target)
    assert [str(problem) for problem in made.errors] == []
    assert sum(layer.bytes_before for layer in made.layers) == TOTAL_SIZE
    experts = [layer for layer in made.layers if layer.kind == "expert"]
    assert len(experts) == 24 * 32 * 3
    assert {layer.action for layer in experts} == {"as stored"}
    # 4 bits and an exponent for 32 of them, and a bias in 16 bits for each output
    size = 24 * 32 * (3 * 2880 * 2880 * 17 // 32 + 3 * 2880 * 2)
    assert sum(layer.bytes_after for layer in experts) == size


def test_rules_that_name_no_expert_leave_them_as_they_are_stored(published: Path) -> None:
    made = plan(published, ATTENTION, target=Target(gpu=find_gpu("H100")))
    assert [str(problem) for problem in made.errors] == []
    assert {x.method for x in made.layers if x.kind == "expert"} == {"mxfp4"}


@pytest.mark.parametrize(
    ("method", "gpu", "tp_size", "message"),
    [
        ("mxfp4", "B200", 2, ""),
        ("bf16", "A100", 4, ""),
        ("mxfp4", "A100", 1, "compute capability is 8.0 (expected 9.0 or more); use method: unq"),
        ("auto", "RTX4090", 1, "compute capability is 8.9 (expected 9.0 or more); use method: unq"),
        ("mxfp4", "H100", 4, "K = 720 per rank is not a multiple of 32, the block that has a sca"),
        ("fp8, requantize: true", "H100", 1, "experts in fp8 add no bias, and it has one; use me"),
        ("awq, requantize: true", "A100", 1, "experts in awq add no bias, and it has one; use me"),
    ],
)
def test_what_sglang_does_not_run_is_refused(
    published: Path, method: str, gpu: str, tp_size: int, message: str
) -> None:
    target = Target(tp_size=tp_size, gpu=find_gpu(gpu))
    made = plan(published, f'match: "*.experts.*", method: {method}', target=target)
    errors = [str(problem) for problem in made.errors]
    assert bool(errors) == bool(message), errors
    assert any(message in text for text in errors) or not message


@pytest.mark.parametrize("may_map", [True, False])
def test_rows_of_gate_and_up_are_told_apart(model: Path, may_map: bool) -> None:
    stored = load_file(model / "model.safetensors")
    source = open_source(model)
    with Reader(Reading(may_map=may_map)) as reader:
        for expert in range(4):
            for first, name in enumerate(("gate_proj", "up_proj")):
                layer = source.layers[f"{EXPERTS}.{expert}.{name}"]
                blocks = stored[f"{EXPERTS}.gate_up_proj_blocks"][expert, first::2]
                assert torch.equal(reader.read(layer["weight"]), blocks.flatten(1))
                scales = stored[f"{EXPERTS}.gate_up_proj_scales"][expert, first::2]
                assert torch.equal(reader.read(layer["weight_scale"]), scales)
                bias = stored[f"{EXPERTS}.gate_up_proj_bias"][expert, first::2]
                assert torch.equal(reader.read(layer["bias"]), bias)
                part = reader.read_part(layer["weight"], (range(32, 96), range(16, 48)))
                assert torch.equal(part, blocks.flatten(1)[32:96, 16:48])
            layer = source.layers[f"{EXPERTS}.{expert}.down_proj"]
            down = stored[f"{EXPERTS}.down_proj_blocks"][expert].flatten(1)
            assert torch.equal(reader.read(layer["weight"]), down)


@pytest.mark.slow
def test_dequantized_they_are_the_weights_that_transformers_makes(model: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    stored = load_file(model / "model.safetensors")
    made = plan(model, 'match: "*.experts.*", method: bf16', target=Target("cpu"))
    stream = dict(iter(VirtualCheckpoint(made)))
    for fused, names in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
        packed = (stored[f"{EXPERTS}.{fused}_{end}"] for end in ("blocks", "scales"))
        # [E, K, N]
        expected = convert_moe_packed_tensors(*packed, dtype=torch.bfloat16).transpose(1, 2)
        for expert in range(4):
            for first, name in enumerate(names):
                weight = stream[f"{EXPERTS}.{expert}.{name}.weight"]
                assert torch.equal(weight, expected[expert, first :: len(names)])


def test_what_was_converted_is_the_same_and_verified(model: Path, tmp_path: Path) -> None:
    rules = write_preset(tmp_path, 'match: "*.experts.*", method: mxfp4', ATTENTION)
    out = converted(model, rules, tmp_path / "converted")
    code, printed, err = run("verify", "--model", out, "--reference", model)
    assert code == 0, printed + err
    again, first = open_source(out), open_source(model)
    with Reader() as reader:
        for suffix in ("weight", "weight_scale", "bias"):
            layer = f"{EXPERTS}.2.up_proj"
            pair = [reader.read(source.layers[layer][suffix]) for source in (again, first)]
            assert torch.equal(*pair)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"down_proj_scales": None}, "its experts are stored in down_proj_bias, down_proj_blocks"),
        ({"gate_up_proj_blocks": (4, 256, 4, 8)}, "its experts are stored as [4, 256, 4, 8] and"),
        ({"down_proj_bias": (4, 64)}, "down_proj_bias [4, 64] is of other experts than those of"),
        ({"gate_up_proj_scales": (3, 256, 4)}, "[3, 256, 4] cannot be split over its 4 experts"),
    ],
)
def test_experts_that_are_not_whole_are_refused(
    model: Path, tmp_path: Path, changes: dict[str, tuple[int, ...] | None], message: str
) -> None:
    import json

    from tests.checkpoints import write_checkpoint

    tensors = load_file(model / "model.safetensors")
    for name, shape in changes.items():
        old = tensors.pop(f"{EXPERTS}.{name}")
        if shape is not None:
            tensors[f"{EXPERTS}.{name}"] = old.new_zeros(shape)
    config = json.loads((model / "config.json").read_text())
    broken = write_checkpoint(tmp_path / "broken", config, tensors)
    errors = [str(problem) for problem in plan(broken, ATTENTION, target=Target()).errors]
    assert any(text.startswith(f"{EXPERTS}: ") and message in text for text in errors), errors
