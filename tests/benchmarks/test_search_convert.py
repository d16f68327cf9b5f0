"""Presets that are calibrated together are what `mixedprec convert` writes of each."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.calibration import run
from benchmarks.search_convert import convert_all
from mixedprec_plugin.calibrate.calibrator import Options
from tests.calibrate.models import write_model


def test_models_of_one_sweep_are_those_of_conversions(tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_model(model)
    rule = '{{match: "{0}", method: {1}, group_size: 32, rounding: calibrated}}'
    presets = {}
    for name, globs in {
        "all": {"*_proj": "awq"},
        "some": {"*.mlp.*": "awq", "*o_proj": "gptq"},
    }.items():
        presets[name] = tmp_path / f"{name}.yaml"
        rules = ", ".join(rule.format(*one) for one in globs.items())
        presets[name].write_text(f"version: 1\nrules: [{rules}]\n")
    work = tmp_path / "work"
    work.mkdir()
    said: list[str] = []
    made = convert_all(model, presets, work, Options(windows=6, length=24), said.append)
    for name, preset in presets.items():
        out = tmp_path / f"converted-{name}"
        run(
            "convert", "--device", "cpu", "--model", model, "--preset", preset, "--out", out,
            "--windows", 6, "--length", 24,
        )  # fmt: skip
        (expected,), (found,) = (list(x.glob("*.safetensors")) for x in (out, made[name]))
        ours, theirs = load_file(found), load_file(expected)
        assert ours.keys() == theirs.keys()
        assert all(
            torch.equal(ours[x].view(torch.uint8), theirs[x].view(torch.uint8)) for x in ours
        )
    num_said = len(said)
    assert convert_all(model, presets, work, Options(windows=6, length=24), said.append) == made
    assert len(said) == num_said
