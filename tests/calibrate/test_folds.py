"""Scales that are folded between layers: the model stays what it was, its folder can be mixed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mixedprec_plugin.calibrate import calibrator, folded
from mixedprec_plugin.calibrate.folded import FoldedRounding, factors
from mixedprec_plugin.calibrate.folds import find_folds, layers_of
from mixedprec_plugin.calibrate.rounding import Moments, Scales
from mixedprec_plugin.checkpoint.reader import Reader
from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.plan.model import Plan
from mixedprec_plugin.plan.resolve import resolve_plan
from mixedprec_plugin.preset.load import load_resolved
from tests.calibrate.models import VOCABULARY, write_model
from tests.calibrate.test_convert import (
    CALIBRATE,
    Killed,
    command,
    convert,
    evaluate,
    given,
    preset_of,
    same_by_two,
    tried,
)

CPU = torch.device("cpu")


def write_uneven(folder: Path, kind: str = "llama") -> None:
    """A model whose norms and biases differ from feature to feature."""
    write_model(folder, kind)
    path, generator = folder / "model.safetensors", torch.Generator().manual_seed(7)
    tensors = load_file(path)
    for name, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("norm.weight"):
            made = tensor + 1.5 * noise.abs() if "gemma" in kind else tensor * noise.exp()
            tensors[name] = made.bfloat16()
        elif name.endswith(".bias"):
            tensors[name] = noise.bfloat16()
    save_file(tensors, path, {"format": "pt"})


QUANTIZED = "*{_proj,c_fc}"


def plan_of(
    folder: Path, rules: list[dict[str, Any]] | None = None, more: dict[str, Any] | None = None
) -> Plan:
    rules = rules or [{"match": QUANTIZED, "method": "gptq", "bits": 8, "group_size": 32}]
    preset = load_resolved({"version": 1, "rules": rules, **(more or {})}, "test")
    return resolve_plan(preset, open_source(folder), Target("cpu")).check()


def rounded(plan: Plan) -> set[str]:
    return {layer.name for layer in plan.layers if not layer.is_unquantized}


def searched(plan: Plan) -> tuple[dict[str, Scales], dict[str, torch.Tensor]]:
    """The scales of layers, and the norms, by inputs of uneven sizes."""
    folds, generator = find_folds(plan, rounded(plan)), torch.Generator().manual_seed(1)
    scales: dict[str, Scales] = {}
    norms: dict[str, torch.Tensor] = {}
    with Reader() as reader:
        rounding = FoldedRounding(plan.target, reader, CPU, folds)
        for group in folds.groups:
            moments = {}
            for layer in layers_of(group):
                assert layer.stored is not None
                K = layer.stored.K
                sizes = torch.randn(K, generator=generator).mul(2).exp()
                x = torch.randn(50, K, generator=generator) * sizes
                moments[layer.name] = Moments(x, torch.ones(50), None)
                moments[layer.name].of(slice(0, K))
            scales |= {layer.name: rounding._no_scales(layer) for layer in layers_of(group)}
            for unit in group:
                exponent, new, made = rounding._search(unit, moments, scales)
                assert exponent == 0.5
                scales |= new
                if made:
                    norms[unit.maker.name] = made["weight"]
    return scales, norms


@pytest.mark.parametrize(
    ("kind", "per_block"), [("llama", 4), ("qwen2", 4), ("gemma3_text", 4), ("qwen3_moe", 2)]
)
def test_folded_model_makes_the_same_predictions(
    tmp_path: Path, kind: str, per_block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By transformers, in float32, the norms in bfloat16, each unit folded as far as may be."""
    monkeypatch.setattr(folded, "EXPONENTS", (0.5,))
    write_uneven(tmp_path, kind)
    plan = plan_of(tmp_path)
    scales, norms = searched(plan)
    assert find_folds(plan, rounded(plan)).num_units == 3 * per_block
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = torch.arange(3, VOCABULARY).view(3, -1)
    with torch.no_grad():
        expected = model(tokens).logits
        for name, own in scales.items():
            module = model.get_submodule(name)
            module.weight.mul_(own.columns)
            # what reads v and up was multiplied alone: the rest of the fold is missing
        assert float((model(tokens).logits - expected).abs().max()) > 0.1 * float(expected.std())
        for name, own in scales.items():
            module = model.get_submodule(name)
            module.weight.mul_(own.rows[:, None])
            if module.bias is not None:
                module.bias.mul_(own.rows)
        for name, weight in norms.items():
            assert weight.dtype == torch.bfloat16
            model.get_submodule(name).weight.copy_(weight)
        assert len(norms) >= 3
        difference = (model(tokens).logits - expected).abs().max()
    assert float(difference) < 1e-3 * float(expected.std())


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("qwen3_moe", [
            "model.layers.0-2.mlp.experts.0-3.down_proj: experts are left as they are",
            "model.layers.0-2.post_attention_layernorm: a router and experts read it",
        ]),
        ("arcee", [
            "model.layers.0-2.mlp.down_proj: its inputs are not linear in what up_proj alone makes",
        ]),
        ("starcoder2", [
            "model.layers.0-2.mlp.c_proj: its inputs are not linear in what c_fc alone makes",
            "model.layers.0-2.input_layernorm, model.layers.0-2.post_attention_layernorm: "
            "it holds bias, weight (expected a weight alone)",
        ]),
    ],
)  # fmt: skip
def test_what_cannot_be_folded_is_left_and_said(tmp_path: Path, kind: str, said: list[str]) -> None:
    write_model(tmp_path, kind)
    plan = plan_of(tmp_path, [{"match": QUANTIZED, "method": "awq", "group_size": 32}])
    assert [str(problem) for problem in find_folds(plan, rounded(plan)).left] == said


def test_layers_beside_others_that_stay_are_left_as_they_are(tmp_path: Path) -> None:
    write_model(tmp_path)
    rules = [
        {"match": QUANTIZED, "method": "awq", "group_size": 32},
        {"match": "*.0.self_attn.{q,k,v}_proj", "method": "bf16"},
        {"match": "*.1.mlp.{gate,up}_proj", "method": "bf16"},
    ]
    plan = plan_of(tmp_path, rules)
    folds = find_folds(plan, rounded(plan))
    assert [str(problem) for problem in folds.left] == [
        "model.layers.0.self_attn.o_proj: v_proj is not calibrated",
        "model.layers.1.mlp.down_proj: up_proj is not calibrated",
    ]
    assert folds.num_units == 12 - 4
    more = {"kv_cache": {"dtype": "fp8_e4m3", "scales": "calibrate"}}
    plan = plan_of(tmp_path, rules[:1], more)
    assert [str(problem) for problem in find_folds(plan, rounded(plan)).left] == [
        "model.layers.0-2.self_attn.o_proj: the KV cache has scales for what v_proj makes"
    ]


def test_folded_folder_is_served_verified_and_never_mixed_wrongly(tmp_path: Path) -> None:
    model, out, preset = tmp_path / "model", tmp_path / "out", preset_of(tmp_path)
    write_uneven(model, "llama with biases")
    options = ("--calibrate", "--windows", 24)
    printed = convert(model, preset, out, *options, "--fold")
    convert(model, preset, tmp_path / "plain", *options)
    record = json.loads((out / "mixedprec_calibration.json").read_text())
    count = len(record["folded"])
    assert count > 6
    assert f"scales folded in {count} of 12 units of layers" in printed
    plain, made = (
        json.loads((tmp_path / name / "mixedprec_calibration.json").read_text())["predicted_loss"]
        for name in ("plain", "out")
    )
    assert made < plain
    rows = evaluate(model, "--preset", tmp_path / "plain", "--preset", out)
    _, unfolded, kl = (row["found"]["kl"]["value"] for row in rows)
    # nothing but rounding: a norm or a bias that is not divided costs nats
    assert kl < 1.1 * unfolded
    words = ("--device", "cpu", "--model", out)
    code, text, err = command("verify", *words, "--reference", model)
    assert code == 0, text + err
    assert command("plan", *words)[0] == 0
    code, text, _ = command("inspect", out)
    assert (code, f"{count} norms and layers are divided for what reads them" in text) == (0, True)
    mixed = tmp_path / "mixed.yaml"
    for part, other in (("down_proj", "up_proj"), ("o_proj", "v_proj")):
        mixed.write_text(
            f"version: 1\nsources: {{folded: {{path: {out}}}}}\ntrust_sources: true\nrules:\n"
            f"  - {{match: '*.{part}', method: awq, group_size: 32, source: folded}}\n"
        )
        code, text, err = command("plan", "--device", "cpu", "--model", model, "--preset", mixed)
        assert code == 1
        assert f"is right only behind its own {other}" in text + err
        assert "is marked to have scales folded between the two" in text + err
    mixed.write_text(
        f"version: 1\nsources: {{folded: {{path: {out}}}}}\nrules:\n"
        "  - {match: '*.self_attn.*_proj', method: awq, group_size: 32, source: folded}\n"
    )
    rows = evaluate(model, "--preset", mixed)
    assert rows[1]["found"]["kl"]["value"] < kl


def test_export_for_stock_engines_is_folded_alike(tmp_path: Path) -> None:
    model, preset, plain = tmp_path / "model", preset_of(tmp_path), tmp_path / "bf16.yaml"
    write_uneven(model)
    options = (*CALIBRATE, "--windows", 8, "--fold")
    convert(model, preset, tmp_path / "ours", *options)
    convert(model, preset, tmp_path / "theirs", *options, "--format", "compressed-tensors")
    plain.write_text("version: 1\nrules:\n  - {match: '*_proj', method: bf16}\n")
    ours, theirs = (
        evaluate(tmp_path / name, "--reference", model, "--preset", plain)[1]
        for name in ("ours", "theirs")
    )
    assert ours["found"] == theirs["found"]
    own = json.loads((tmp_path / "theirs" / "mixedprec_calibration.json").read_text())
    assert own["folded"]


def test_killed_and_by_two_ranks_it_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, preset = tmp_path / "model", preset_of(tmp_path)
    write_uneven(model)
    options = (*CALIBRATE, "--fold", "--windows", 8)
    convert(model, preset, tmp_path / "whole", *options)
    rounding, calls = FoldedRounding.__call__, []

    def killed(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise Killed
        return rounding(*args)

    with monkeypatch.context() as patches:
        patches.setattr(calibrator.FoldedRounding, "__call__", killed)
        with pytest.raises(Killed):
            convert(model, preset, tmp_path / "out", *options)
        convert(model, preset, tmp_path / "out", *options)
    for name in ("model.safetensors", "mixedprec_calibration.json", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert same_by_two(model, preset, tmp_path / "whole", *options) > 0.98


def test_without_gradients_it_is_judged_by_the_moments(tmp_path: Path) -> None:
    model, preset = tmp_path / "model", preset_of(tmp_path)
    write_uneven(model)
    options = (*CALIBRATE, "--no-gradients", "--windows", 96)
    for name, more in (("out", ["--fold"]), ("plain", [])):
        convert(model, preset, tmp_path / name, *options, *more)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"][
        "folded"
    ]
    rows = evaluate(model, "--preset", tmp_path / "plain", "--preset", tmp_path / "out")
    _, unfolded, kl = (row["found"]["kl"]["value"] for row in rows)
    assert kl < 1.1 * unfolded


def test_what_folding_does_not_help_is_left_unfolded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, preset = tmp_path / "model", preset_of(tmp_path)
    write_uneven(model)
    options = (*CALIBRATE, "--windows", 8)
    convert(model, preset, tmp_path / "plain", *options)
    # a fold that only makes things worse, taken for the best by what searches it
    monkeypatch.setattr(folded, "EXPONENTS", (1.0,))

    def worse(*args: Any) -> torch.Tensor:
        found = factors(*args)
        return torch.where(torch.arange(len(found)) % 2 > 0, 16.0, 1 / 16).double()

    monkeypatch.setattr(folded, "factors", worse)
    printed = convert(model, preset, tmp_path / "out", *options, "--fold")
    assert "scales folded in 0 of 12 units of layers" in printed
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_folding_is_refused_where_it_does_nothing(tmp_path: Path) -> None:
    model, preset = given(tmp_path)
    out = tmp_path / "out"
    code, _, err = tried(model, preset, out, "--fold")
    assert (code, "--fold: is for calibration; add --calibrate" in err) == (2, True)
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "other", "architectures": ["OtherForCausalLM"]}
    (model / "config.json").write_text(json.dumps(config))
    code, _, err = tried(model, preset, out, "--calibrate", "--fold")
    assert code == 1
    assert "--fold: no layers of the plan can be folded (nothing is known of what reads" in err
