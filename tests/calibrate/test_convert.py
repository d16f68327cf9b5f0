"""`mixedprec convert --calibrate` and `mixedprec eval`, from the command line."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.llama.modeling_llama import LlamaMLP

from mixedprec_plugin.calibrate.network import Network
from mixedprec_plugin.calibrate.rounding import LayerRounding
from mixedprec_plugin.convert import converter, folder
from tests.calibrate.models import write_model, write_words
from tests.commands import convert as tried
from tests.commands import run as command

PRESET = "version: 1\nrules:\n  - {match: '*_proj', method: METHOD, group_size: 32}\n"
# text is written a token at a time
CALIBRATE = ("--calibrate", "--length", 32)


class Killed(BaseException):
    """What nothing catches."""


def preset_of(folder: Path, method: str = "awq", extra: str = "") -> Path:
    path = folder / f"{method}{len(extra)}.yaml"
    text = PRESET.replace(", group_size: 32", "") if method.endswith("fp4") else PRESET
    if method == "mxfp4":
        text = text.replace("*_proj", "*.experts.*")
    path.write_text(text.replace("METHOD", method + extra), encoding="utf-8")
    return path


def given(folder: Path, kind: str = "llama", *method: str) -> tuple[Path, Path]:
    """A model and a preset for it."""
    write_model(folder / "model", kind)
    return folder / "model", preset_of(folder, *method)


def convert(model: Path, preset: Path, out: Path, *more: object) -> str:
    code, printed, err = tried(model, preset, out, *more)
    assert code == 0, err
    return printed


def same_by_two(model: Path, preset: Path, one: Path, *options: object) -> float:
    """Convert by two processes: the share of numbers that are those of one process."""
    out = one.with_name("two")
    run = ["torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    words = ["convert", "--device", "cpu", "--model", model, "--preset", preset, "--out", out]
    made = subprocess.run(
        [sys.executable, "-m", *run, "-m", "mixedprec_plugin", *map(str, (*words, *options))],
        check=False, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    first, second = (load_file(folder / "model.safetensors") for folder in (one, out))
    assert first.keys() == second.keys()
    same = sum(int((first[name] == second[name]).sum()) for name in first)
    return same / sum(tensor.numel() for tensor in first.values())


def evaluate(model: Path, *more: object) -> list[dict[str, Any]]:
    text = write_words(model.parent / "text.txt")
    code, printed, err = command(
        "eval", "--device", "cpu", "--model", model, "--text", text, "--length", 64, "--json",
        *more,
    )  # fmt: skip
    assert code == 0, err
    rows: list[dict[str, Any]] = json.loads(printed)["rows"]
    return rows


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("llama", "awq"),
        ("qwen3_moe", "gptq"),
        ("llama", "humming"),
        ("llama", "nvfp4"),
        ("qwen3_moe", "mxfp4"),
    ],
)
def test_calibrated_folder_costs_less_than_rounding_to_nearest(
    tmp_path: Path, kind: str, method: str
) -> None:
    model, preset = given(tmp_path, kind, method)
    printed = convert(model, preset, tmp_path / "out", "--calibrate", "--windows", 96)
    record = json.loads((tmp_path / "out" / "mixedprec_calibration.json").read_text())
    assert f"{record['predicted_loss']:.4f}" in printed
    assert record["windows"] == 96
    rows = evaluate(model, "--preset", preset, "--preset", tmp_path / "out")
    same, nearest, made = (row["found"]["kl"]["value"] for row in rows)
    assert same == pytest.approx(0, abs=1e-6)
    assert made < 0.85 * nearest
    # by text that was held out
    assert record["predicted_loss"] == pytest.approx(made, rel=0.35)
    assert command("plan", "--device", "cpu", "--model", tmp_path / "out")[0] == 0


def test_experts_that_saw_no_token_are_said(tmp_path: Path) -> None:
    model, preset = given(tmp_path, "qwen3_moe")
    # one token beside the first: 4 experts a layer, of which each token goes to 2
    words = ("--calibrate", "--windows", 1, "--length", 2)
    printed = convert(model, preset, tmp_path / "out", *words)
    record = json.loads((tmp_path / "out" / "mixedprec_calibration.json").read_text())
    unseen = [x["layer"] for x in record["layers"] if ".experts." in x["layer"] and not x["tokens"]]
    assert unseen
    assert f"reached {len(unseen)} layers of experts, such as {unseen[0]}:" in printed
    again = convert(model, preset, tmp_path / "all", *CALIBRATE, "--windows", 32)
    assert "no token" not in again


def test_export_for_stock_engines_holds_the_same_numbers(tmp_path: Path) -> None:
    model, preset = given(tmp_path)
    options = (*CALIBRATE, "--windows", 8)
    convert(model, preset, tmp_path / "ours", *options)
    convert(model, preset, tmp_path / "theirs", *options, "--format", "compressed-tensors")
    plain = preset_of(tmp_path, "bf16").read_text().replace(", group_size: 32", "")
    (tmp_path / "bf16.yaml").write_text(plain)
    ours, theirs = (
        evaluate(tmp_path / name, "--reference", model, "--preset", tmp_path / "bf16.yaml")[1]
        for name in ("ours", "theirs")
    )
    assert ours["found"] == theirs["found"]


def test_killed_it_goes_on_and_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, preset = given(tmp_path)
    options = (*CALIBRATE, "--windows", 8)
    convert(model, preset, tmp_path / "whole", *options)
    rounding, calls = LayerRounding.__call__, []

    def killed(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise Killed
        return rounding(*args)

    monkeypatch.setattr(LayerRounding, "__call__", killed)
    with pytest.raises(Killed):
        convert(model, preset, tmp_path / "out", *options)
    convert(model, preset, tmp_path / "out", *options)
    # three decoder layers: one was finished, one was begun twice
    assert len(calls) == 4
    for name in ("model.safetensors", "mixedprec_calibration.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list((tmp_path / "out").glob(".*"))


def test_codes_of_a_source_that_changed_since_are_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model, preset), out = given(tmp_path), tmp_path / "out"

    def stop(*_: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patches:
        patches.setattr(converter, "write_part", stop)
        with pytest.raises(Killed):
            convert(model, preset, out, *CALIBRATE, "--windows", 8)
    os.utime(model / "model.safetensors")
    code, _, err = tried(model, preset, out, *CALIBRATE, "--windows", 8)
    assert code == 1
    assert "holds an unfinished conversion of other inputs (the sources' files changed)" in err


def test_other_options_are_another_conversion(tmp_path: Path) -> None:
    model, preset = given(tmp_path)
    convert(model, preset, tmp_path / "out")
    out = tmp_path / "out"
    code, _, err = tried(model, preset, out, "--calibrate", "--windows", 8)
    assert code == 1
    assert "the calibration changed" in err


def test_scheme_that_asks_for_it_is_calibrated_and_not_rounded_while_loading(
    tmp_path: Path,
) -> None:
    model, preset = given(tmp_path, "llama", "awq", ", rounding: calibrated")
    code, _, err = command("eval", "--device", "cpu", "--model", model, "--preset", preset)
    assert code == 1
    assert f"run mixedprec convert --model {model} --preset {preset} --out DIR" in err
    convert(model, preset, tmp_path / "out", "--windows", 8, "--length", 32)
    assert (tmp_path / "out" / "mixedprec_calibration.json").exists()
    assert command("plan", "--device", "cpu", "--model", tmp_path / "out")[0] == 0


def test_refuses_what_has_nothing_to_calibrate(tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_model(model)
    preset = tmp_path / "bf16.yaml"
    preset.write_text("version: 1\nrules:\n  - {match: '*_proj', method: bf16}\n")
    out = tmp_path / "out"
    code, _, err = tried(model, preset, out, "--calibrate")
    assert (code, "no layer of the plan is rounded to codes" in err) == (1, True)
    for option in (("--text", preset), ("--windows", 4), ("--seed", 0), ("--no-gradients",)):
        code, _, err = tried(model, preset, out, *option)
        assert (code, f"{option[0]}: is for calibration; add --calibrate" in err) == (2, True)


def test_a_layer_that_is_in_no_decoder_layer_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of a vision tower are, which the language model does not have."""
    model, preset = given(tmp_path)
    planned = Network.planned
    monkeypatch.setattr(
        Network,
        "planned",
        lambda self, i: [x for x in planned(self, i) if not x.name.endswith("1.mlp.up_proj")],
    )
    out = tmp_path / "out"
    code, _, err = tried(model, preset, out, "--calibrate")
    assert code == 1
    assert "model.layers.1.mlp.up_proj: transformers' language model has no decoder layer" in err


def test_a_layer_that_is_no_linear_one_in_transformers_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, preset = given(tmp_path)

    def forward(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        gate = x @ self.gate_proj.weight.t()
        made: torch.Tensor = self.down_proj(self.act_fn(gate) * self.up_proj(x))
        return made

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    out = tmp_path / "out"
    code, _, err = tried(model, preset, out, *CALIBRATE, "--windows", 2)
    assert code == 1
    assert "does not run model.layers.2.mlp.gate_proj as a linear layer" in err


def test_full_disk_is_an_error_that_can_be_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, preset = given(tmp_path)
    out = tmp_path / "out"
    options = ("--calibrate", "--windows", 8)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        code, _, err = tried(model, preset, out, *options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert (code, "run the same command again: it continues" in err) == (1, True), err
    convert(model, preset, out, *options)


def test_space_for_hidden_states_is_asked_for_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model, preset), out = given(tmp_path), tmp_path / "out"
    # 8 windows of 128 tokens, 64 numbers each, before 3 layers, behind the last, and two gradients
    states = 8 * 128 * 64 * 4 * 6
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda _: usage._replace(free=states))
    code, _, err = tried(model, preset, out, "--calibrate", "--windows", 8)
    assert (code, f"has {states:,} bytes free" in err) == (1, True), err
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda _: usage._replace(free=2 * states))
    convert(model, preset, out, "--calibrate", "--windows", 8)


def test_eval_refuses_a_quantized_reference(tmp_path: Path) -> None:
    model, preset = given(tmp_path)
    convert(model, preset, tmp_path / "out")
    code, _, err = command("eval", "--device", "cpu", "--model", tmp_path / "out")
    assert code == 2
    assert "name the unquantized model with --reference" in err


def test_eval_in_the_engine_refuses_a_gpu_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, preset = given(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = command("eval", "--model", model, "--preset", preset, "--engine", "sglang")
    assert (code, "--device: cuda is not there" in err) == (2, True), err


def test_two_ranks_round_as_one_does(tmp_path: Path) -> None:
    """By torchrun and gloo: a layer's tokens come together in the order of their windows."""
    model, preset = given(tmp_path, "qwen3_moe", "gptq")
    options = (*CALIBRATE, "--windows", 7)
    convert(model, preset, tmp_path / "one", *options)
    # products of other numbers of rows round otherwise in their last bits
    assert same_by_two(model, preset, tmp_path / "one", *options) > 0.99
