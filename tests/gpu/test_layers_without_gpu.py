"""What the tests of layers on a GPU do, done with the CPU platform's methods."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.exact import GROUP, compare, inputs, quantized_input
from tests.gpu.exact_experts import evaluate

ROOT = Path(__file__).resolve().parents[2]
NUM_CELLS = 14 * 3 + 15 * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU: the layers are run on it")
def test_layers_are_within_the_limits_that_hold_on_a_gpu() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.on_cpu"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == NUM_CELLS
    assert not {name: text for name, text in found.items() if text.startswith("WRONG")}


@pytest.mark.parametrize("method", ["fp8", "fp8_channel", "fp8_block", "blockwise_int8"])
def test_no_other_number_than_the_greatest_is_near_a_boundary_of_codes(method: str) -> None:
    """Or a rounding of the scale would change what is multiplied."""
    x = inputs(64, 512)
    plain = quantized_input(method, x)
    for factor in (1 - 2**-19, 1 + 2**-19):
        # the greatest stays, and so do the scales
        moved = torch.where(x.abs() == x.abs().max(), x.double(), x.double() * factor)
        turned = (quantized_input(method, moved) - plain).abs() > 1e-3
        assert not turned.any()


def test_quantized_inputs_are_as_the_formats_say() -> None:
    x = torch.zeros(1, GROUP)
    x[0, :4] = torch.tensor([448.0, 17.0, -17.1, 3.3])
    # e4m3 has 8 numbers between two powers of two; a tie goes to the even one
    expected = torch.tensor([448.0, 16.0, -18.0, 3.25], dtype=torch.float64)
    assert torch.equal(quantized_input("fp8_block", x)[0, :4], expected)
    x[0, :4] = torch.tensor([127.0, 5.9, -5.9, 0.0])
    expected = torch.tensor([127.0, 5.0, -5.0, 0.0], dtype=torch.float64)
    assert torch.equal(quantized_input("blockwise_int8", x)[0, :4], expected)
    x[0, :4] = torch.tensor([127.0, 5.9, -5.5, 0.4])
    expected = torch.tensor([127.0, 6.0, -6.0, 0.0], dtype=torch.float64)
    assert torch.equal(quantized_input("int8_channel", x)[0, :4], expected)


def test_one_wrong_token_is_not_within() -> None:
    exact = torch.ones(300, 8, dtype=torch.float64)
    out = exact.clone()
    assert compare(out, exact, 0.07).is_within
    out[7] = 0
    assert not compare(out, exact, 0.07).is_within


def test_masked_and_repeated_choices_are_summed() -> None:
    one = {name: torch.ones(1, 1, dtype=torch.float64) for name in ("gate", "up", "down")}
    two = {**one, "down": torch.full((1, 1), 2.0, dtype=torch.float64)}
    x, ids = torch.ones(2, 1), torch.tensor([[0, 1], [-1, 1]])
    out = evaluate(x, torch.tensor([[1.0, 0.5], [1.0, 0.25]]), ids, [one, two])
    silu = 1 / (1 + torch.tensor(-1.0, dtype=torch.float64).exp())
    assert torch.allclose(out[:, 0], silu * torch.tensor([2.0, 0.5], dtype=torch.float64))
