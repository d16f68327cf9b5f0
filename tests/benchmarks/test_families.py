"""A few cells of the table of families: served by SGLang, held against transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.families.comparison import LIMIT

pytestmark = pytest.mark.sglang

ROOT = Path(__file__).resolve().parents[2]
CELLS = ("Phi-3/gptq", "Qwen3-MoE/mixed", "DeepSeek-V3/mixed")

Cells = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Cells:
    """The cells, from one process that imports SGLang once and forks a child for each engine."""
    page = tmp_path_factory.mktemp("families") / "families.md"
    flags = [flag for cell in CELLS for flag in ("--cell", cell)]
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.families", "--out", str(page)]
    done = subprocess.run(
        [*command, *flags], cwd=ROOT, capture_output=True, text=True, timeout=590, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    return {f"{cell['family']}/{cell['method']}": cell for cell in found}


@pytest.mark.parametrize("ranks", ["1", "2"])
@pytest.mark.parametrize("cell", CELLS)
def test_each_layer_gets_what_transformers_gives_it_on_dequantized_weights(
    cells: Cells, cell: str, ranks: str
) -> None:
    held = cells[cell]["held"][ranks]
    assert 0 < held["worst_input"]["error"] <= LIMIT
    assert held["logits"]["worst"] <= LIMIT < cells[cell]["effect_of_the_method"]
    assert (held["elsewhere"], held["logits"]["unexplained"]) == (0, 0)


@pytest.mark.parametrize("cell", CELLS[1:])
def test_tokens_go_to_the_experts_that_transformers_chooses(cells: Cells, cell: str) -> None:
    held = cells[cell]["held"]["1"]
    assert held["choices_of_experts"] >= 24 + 8
    assert held["tied"] < 3


def test_what_latent_attention_cannot_absorb_is_refused_in_the_plan(cells: Cells) -> None:
    cell = cells["DeepSeek-V3/mixed"]
    assert cell["kept_in_bf16"] == "*.kv_b_proj"
    assert "cannot be absorbed in fp8_block" in cell["refused"]["1"][0]


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Cells:
    """Newer families: two that the CPU engine runs, and one that it does not."""
    page = tmp_path_factory.mktemp("newer") / "families.md"
    flags = ["--newer", "Granite 3 MoE", "--newer", "Qwen3-Next", "--newer", "gpt-oss"]
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.families", "--out", str(page)]
    done = subprocess.run(
        [*command, *flags], cwd=ROOT, capture_output=True, text=True, timeout=590, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| Qwen3-Next | fp8 | **loads right** |" in page.read_text(encoding="utf-8")
    found = json.loads(page.with_name("families_newer.json").read_text(encoding="utf-8"))
    return {family["family"]: family for family in found}


def test_experts_that_the_plan_does_not_know_are_served_in_floats(newer: Cells) -> None:
    granite = newer["Granite 3 MoE"]
    assert granite["outcome"] == "serves and agrees"
    assert granite["logits"]["bf16"] <= 0.03


def test_gpt_oss_is_served_with_its_experts_as_they_are_stored(newer: Cells) -> None:
    """Held against transformers, which dequantizes them by itself on a CPU."""
    oss = newer["gpt-oss"]
    assert (oss["outcome"], oss["method"]) == ("serves and agrees", "fp8")
    assert oss["logits"]["bf16"] <= 0.03


def test_linear_attention_is_loaded_as_sglang_loads_it(newer: Cells) -> None:
    qwen = newer["Qwen3-Next"]
    assert (qwen["outcome"], qwen["failures"]) == ("loads right", [])
    assert qwen["same"] > 0 < qwen["rounded"]
