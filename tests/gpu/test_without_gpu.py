"""What of the GPU tests a machine without a GPU can check."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mixedprec_plugin.cpu.heap import storage_bytes
from tests.checkpoints import write_llama
from tests.gpu.card import preset_plan, why_not, why_skip
from tests.gpu.speed import speed
from tests.gpu.test_presets import NAMES

_SCRIPT = Path(__file__).with_name("run.sh")


@pytest.mark.parametrize(
    ("capability", "reason"),
    [(None, "needs an NVIDIA GPU"), (75, "needs compute capability 8.0 or more: this GPU has 7.5")],
)
def test_machine_without_a_fitting_gpu_is_skipped_with_the_reason(
    capability: int | None, reason: str
) -> None:
    assert why_skip(capability).startswith(reason)


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_preset_runs_on_an_h100(name: str, widened_model: Path) -> None:
    assert why_not(preset_plan(name, widened_model, 90), 90) == []


def test_method_that_the_gpu_lacks_is_a_reason(tmp_path: Path) -> None:
    plan = preset_plan("attention-fp8-mlp-int4", write_llama(tmp_path / "model"), 75)
    reasons = why_not(plan, 75)
    assert any(reason.startswith("fp8 does not run on this GPU") for reason in reasons), reasons


def test_tied_weights_count_once() -> None:
    weight = torch.zeros(16, 4)
    assert storage_bytes([weight, weight.t(), torch.zeros(2)]) == 16 * 4 * 4 + 2 * 4


def test_speed_leaves_out_the_first_token() -> None:
    assert speed(4, 101, 0.5, 2.5) == 200.0
    with pytest.raises(ValueError, match=r"101 tokens took 0.4 s .expected more than 0.5 s"):
        speed(4, 101, 0.5, 0.4)


def test_script_says_what_it_lacks(tmp_path: Path) -> None:
    """With no Python that has SGLang, and no wheelhouse."""
    python = tmp_path / "python3"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "MIXEDPREC_TEST_VENV": str(tmp_path / "venv"),
        "MIXEDPREC_WHEELHOUSE": "",
    }
    done = subprocess.run(["sh", str(_SCRIPT)], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "set MIXEDPREC_WHEELHOUSE to a folder of wheels" in done.stderr


def test_script_names_the_packages_that_an_environment_lacks(tmp_path: Path) -> None:
    """An environment that has SGLang, for all that it says, and nothing else."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        "#!/bin/sh\n"
        'case "$2" in\n'
        '  "import sglang, torch") exit 0;;\n'
        f'  *) exec "{sys.executable}" -S -I "$@";;\n'
        "esac\n"
    )
    python.chmod(0o755)
    environment = {
        **os.environ,
        "MIXEDPREC_TEST_VENV": str(tmp_path / "venv"),
        "MIXEDPREC_WHEELHOUSE": "",
    }
    done = subprocess.run(["sh", str(_SCRIPT)], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "lacks accelerate bracex gguf hypothesis jsonschema omegaconf pytest" in done.stderr
