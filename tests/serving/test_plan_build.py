"""`mixedprec plan --build` as a user runs it: SGLang in a process of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import write_llama
from tests.commands import run
from tests.presets import write_preset

FP8 = 'match: "*.layers.*", method: fp8'


@pytest.fixture
def stray(tmp_path: Path) -> Path:
    """A Llama with a tensor that SGLang's has no use for."""
    path = write_llama(tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.2.self_attn.sinks"] = torch.ones(4)
    save_file(tensors, path / "model.safetensors")
    return path


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_what_only_sglangs_model_shows_is_an_error_of_the_plan(
    stray: Path, tmp_path: Path, device: str
) -> None:
    preset = write_preset(tmp_path, FP8)
    asked = ("plan", "--model", stray, "--preset", preset, "--device", device, "--json")
    assert run(*asked)[0] == 0
    code, out, _ = run(*asked, "--build")
    assert code == 1
    (problem,) = json.loads(out)["problems"]
    assert problem["where"] == "model.layers.2.self_attn.sinks"
    assert "LlamaForCausalLM has no parameter for it" in problem["what"]


def test_plan_that_fits_is_printed_as_without_it(tmp_path: Path) -> None:
    model, preset = write_llama(tmp_path / "model"), write_preset(tmp_path, FP8)
    asked = ("plan", "--model", model, "--preset", preset, "--tp", "2")
    assert run(*asked, "--build") == run(*asked)


def test_the_verb_itself_imports_no_torch() -> None:
    import subprocess

    code = "import sys, mixedprec_plugin.cli.plan; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
