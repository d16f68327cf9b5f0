"""`mixedprec eval`: its arithmetic, and models that predict nothing of use."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mixedprec_plugin.evaluate.divergence import summed_kl
from tests.calibrate.models import write_model, write_words
from tests.commands import run
from tests.presets import write_preset


@pytest.mark.parametrize("ruled_out", ["nothing", "by both", "by the reference", "by the model"])
def test_kl_is_that_of_float64_where_tokens_are_ruled_out_too(ruled_out: str) -> None:
    chance = np.random.default_rng(0)
    p, q = chance.normal(0, 3, (2, 40, 33)).astype(np.float32)
    if ruled_out in ("by both", "by the reference"):
        p[:, -2:] = -np.inf
    if ruled_out in ("by both", "by the model"):
        q[:, -2:] = -np.inf
    one, other = (x.astype(np.float64) for x in (p, q))
    one, other = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (one, other))
    terms = [np.exp(a) * (a - b) for a, b in zip(one.flat, other.flat, strict=True) if a > -np.inf]
    found = summed_kl(*(torch.from_numpy(x).log_softmax(-1) for x in (p, q)))
    assert found == pytest.approx(sum(terms), rel=1e-5)


@pytest.mark.parametrize(
    ("parameter", "size", "expected"),
    [
        ("model.norm.weight", 1e4, "inf ± inf"),
        ("model.layers.1.mlp.down_proj.weight", 3e38, "its predictions are NaN"),
    ],
)
def test_damaged_weights_are_a_row_or_an_error(
    tmp_path: Path, parameter: str, size: float, expected: str
) -> None:
    for name in ("model", "damaged"):
        write_model(tmp_path / name)
    path = tmp_path / "damaged" / "model.safetensors"
    tensors = load_file(path)
    tensors[parameter] = (size * tensors[parameter].float().sign()).bfloat16()
    save_file(tensors, path, {"format": "pt"})
    preset, text = write_preset(tmp_path, 'match: "*", method: unquantized'), tmp_path / "text.txt"
    code, out, err = run(
        "eval", "--device", "cpu", "--model", tmp_path / "damaged", "--preset", preset,
        "--reference", tmp_path / "model", "--text", write_words(text), "--length", 64,
    )  # fmt: skip
    assert expected in (err if code else out)
    assert bool(code) == ("NaN" in expected)
