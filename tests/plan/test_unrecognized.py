"""Projections stored as tensors that nobody knows: refused in the plan, listed by inspect."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixedprec_plugin.cli.main import main
from mixedprec_plugin.methods.interface import Target
from tests.checkpoint.peer_experts import MODULE, write_experts
from tests.checkpoints import llama_config, llama_tensors, write_checkpoint, write_llama
from tests.presets import plan, problem_texts

NAME = "model.layers.1.mlp.down_proj"
UNKNOWN = [
    {"codes": torch.zeros(96, 32, dtype=torch.uint8), "scale6": torch.ones(96)},
    {"codes": torch.zeros(96, 32, dtype=torch.int8)},
    {"scale6": torch.ones(96, 2)},
    {"first": torch.ones(96, 8), "second": torch.ones(8, 64)},
    {"values": torch.ones(96 * 64)},
]


def write(folder: Path, stored: dict[str, torch.Tensor], **changes: Any) -> Path:
    tensors = llama_tensors(llama_config())
    del tensors[f"{NAME}.weight"]
    tensors |= {f"{NAME}.{suffix}": tensor for suffix, tensor in stored.items()}
    return write_checkpoint(folder, llama_config(**changes), tensors)


@pytest.mark.parametrize("stored", UNKNOWN, ids=lambda stored: "-".join(stored))
@pytest.mark.parametrize("rule", ['match: "*", method: fp8', 'match: "*.o_proj", method: fp8'])
def test_plan_refuses_it(tmp_path: Path, stored: dict[str, torch.Tensor], rule: str) -> None:
    made = plan(write(tmp_path / "model", stored), rule)
    errors = [text for text in problem_texts(made) if text.startswith("error")]
    assert len(errors) == 1
    assert NAME in errors[0]
    assert ", ".join(sorted(stored)) in errors[0]


@pytest.mark.parametrize("stored", UNKNOWN, ids=lambda stored: "-".join(stored))
def test_inspect_lists_it_and_exits_with_1(tmp_path: Path, stored: dict[str, torch.Tensor]) -> None:
    out = io.StringIO()
    assert main(["inspect", str(write(tmp_path / "model", stored))], out=out) == 1
    assert f"{NAME}: its tensors are of no format that this release knows (" in out.getvalue()


def test_whole_model_has_none(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "model")
    assert main(["inspect", str(folder)], out=io.StringIO()) == 0
    assert problem_texts(plan(folder, 'match: "*", method: fp8')) == []


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("stored", UNKNOWN, ids=lambda stored: "-".join(stored))
def test_auto_refuses_what_nothing_could_read(
    tmp_path: Path, stored: dict[str, torch.Tensor], device: Any
) -> None:
    target = Target(device=device)
    (problem,) = plan(
        write(tmp_path / "m", stored), 'match: "*", method: auto', target=target
    ).errors
    assert (problem.where, problem.rule) == (NAME, "stored-format")
    assert ", ".join(sorted(stored)) in problem.what


def test_auto_leaves_it_to_the_class_that_config_json_names(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", UNKNOWN[0], quantization_config={"quant_method": "w4afp8"})
    assert not plan(folder, 'match: "*", method: auto').errors


@pytest.mark.parametrize("stored", UNKNOWN, ids=lambda stored: "-".join(stored))
def test_plan_refuses_an_expert(tmp_path: Path, stored: dict[str, torch.Tensor]) -> None:
    folder = write_experts(tmp_path / "model", "bf16")
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{MODULE}.1.up_proj.weight"]
    tensors |= {f"{MODULE}.1.up_proj.{suffix}": tensor for suffix, tensor in stored.items()}
    save_file(tensors, folder / "model.safetensors")
    errors = [str(problem) for problem in plan(folder, 'match: "*", method: fp8').errors]
    assert any(f"{MODULE}.1.up_proj" in text and "is stored as" in text for text in errors), errors


@pytest.mark.parametrize("method", ["fp8", "bf16", "auto"])
def test_half_a_packing_that_config_json_leaves_out_is_refused(tmp_path: Path, method: str) -> None:
    said = {"quant_method": "gptq", "bits": 4, "dynamic": {"-:.*down_proj": {}}}
    stored = {"qweight": torch.zeros(64, 256, dtype=torch.int32)}
    made = plan(
        write(tmp_path / "model", stored, quantization_config=said),
        f'match: "*.1.mlp.down_proj", method: {method}',
    )
    errors = [text for text in problem_texts(made) if text.startswith("error")]
    assert any("lacks scales and qzeros" in text or "without scales" in text for text in errors)
