"""Projections stored as tensors that nobody knows: refused in the plan, listed by inspect."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from mixedprec_plugin.cli.main import main
from tests.checkpoints import llama_config, llama_tensors, write_checkpoint, write_llama
from tests.presets import plan, problem_texts

NAME = "model.layers.1.mlp.up_proj"
UNKNOWN = [
    {"codes": torch.zeros(96, 32, dtype=torch.uint8), "scale6": torch.ones(96)},
    {"codes": torch.zeros(96, 32, dtype=torch.int8)},
    {"scale6": torch.ones(96, 2)},
    {"first": torch.ones(96, 8), "second": torch.ones(8, 64)},
    {"values": torch.ones(96 * 64)},
]


def write(folder: Path, stored: dict[str, torch.Tensor]) -> Path:
    tensors = llama_tensors(llama_config())
    del tensors[f"{NAME}.weight"]
    tensors |= {f"{NAME}.{suffix}": tensor for suffix, tensor in stored.items()}
    return write_checkpoint(folder, llama_config(), tensors)


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
