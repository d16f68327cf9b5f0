"""Scales of the KV cache from the text of a calibration, against transformers' own cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from mixedprec_plugin.calibrate.text import read_text
from tests.calibrate.models import write_model, write_words
from tests.commands import convert, run
from tests.presets import write_preset

_KV = "kv_cache: {dtype: fp8_e4m3, scales: calibrate}\n"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_words(tmp_path / "text.txt")


def expected(model: Path, text: Path) -> dict[str, torch.Tensor]:
    """The largest key and value of each layer that transformers caches, over 448."""
    from transformers import AutoModelForCausalLM

    # 8 windows, and one that is held out of calibrating layers
    tokens = read_text(text, AutoTokenizer.from_pretrained(model), 9, 64)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        cache = network(input_ids=tokens, use_cache=True).past_key_values
    found = {}
    for number, layer in enumerate(cache.layers):
        name = f"model.layers.{number}.self_attn.attn"
        found[f"{name}.k_scale"] = layer.keys.abs().max() / 448
        found[f"{name}.v_scale"] = layer.values.abs().max() / 448
    return found


@pytest.mark.parametrize("rule", ['match: "*.mlp.*", method: fp8', 'match: "*", method: bf16'])
@pytest.mark.parametrize("more", [["--no-gradients"], []], ids=["forward", "gradients"])
def test_scales_are_the_largest_that_transformers_caches(
    tmp_path: Path, model: Path, text: Path, rule: str, more: list[str]
) -> None:
    preset, out = write_preset(tmp_path, rule, head=_KV), tmp_path / "out"
    how = ("--text", text, "--windows", 8, "--length", 64, *more)
    code, _, err = convert(model, preset, out, *how)
    assert code == 0, err
    held = load_file(out / "model.safetensors")
    scales = {name: tensor for name, tensor in held.items() if "_scale" in name and "attn" in name}
    wanted = expected(model, text)
    assert scales.keys() == wanted.keys()
    for name, scale in scales.items():
        torch.testing.assert_close(scale, wanted[name], rtol=1e-5, atol=0)
    record = json.loads((out / "mixedprec_calibration.json").read_text())["kv_scales"]
    assert record["model.layers.2.self_attn.attn"]["v_scale"] == float(
        scales["model.layers.2.self_attn.attn.v_scale"]
    )
    # the folder's own preset asks for no text
    code, printed, _ = run("plan", "--model", out, "--device", "cpu")
    assert code == 0
    assert "KV cache in fp8_e4m3, scales of 3 attention layers from model" in printed


def test_calibrated_layers_and_scales_come_of_one_pass(
    tmp_path: Path, model: Path, text: Path
) -> None:
    preset, out = write_preset(tmp_path, 'match: "*.mlp.*", method: fp8', head=_KV), tmp_path / "o"
    how = ("--calibrate", "--text", text, "--windows", 8, "--length", 64)
    code, _, err = convert(model, preset, out, *how)
    assert code == 0, err
    held = load_file(out / "model.safetensors")
    for name, scale in expected(model, text).items():
        torch.testing.assert_close(held[name], scale, rtol=1e-5, atol=0)
    assert json.loads((out / "mixedprec_calibration.json").read_text())["layers"]


def test_plan_tells_of_scales_to_come(tmp_path: Path, model: Path) -> None:
    preset = write_preset(tmp_path, 'match: "*.mlp.*", method: fp8', head=_KV)
    code, printed, _ = run("plan", "--model", model, "--preset", preset, "--device", "cpu")
    assert code == 0
    line = "scales of 3 attention layers, which mixedprec convert computes from text"
    assert f"KV cache in fp8_e4m3, {line}" in " ".join(printed.split())


def test_another_dtype_is_refused(tmp_path: Path, model: Path) -> None:
    head = "kv_cache: {dtype: fp8_e5m2, scales: calibrate}\n"
    preset = write_preset(tmp_path, 'match: "*.mlp.*", method: fp8', head=head)
    code, _, err = run("plan", "--model", model, "--preset", preset, "--device", "cpu")
    assert code == 1
    assert "preset.yaml: kv_cache.scales: calibrate beside dtype: fp8_e5m2 (expected" in err
