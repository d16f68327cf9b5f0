"""Scores against autograd over the whole model, and against the divergence that they predict."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress

from benchmarks.activations import fp8_token
from mixedprec_plugin.calibrate.sweep import Sweep
from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.search.candidates import AS_STORED, Choices, find_choices
from mixedprec_plugin.search.kept import Basis, Scores
from mixedprec_plugin.search.scores import make_scores
from tests.calibrate.models import VOCABULARY, write_model, write_words


def scored(folder: Path, methods: tuple[str, ...], basis: Basis) -> tuple[Choices, Scores]:
    choices = find_choices(open_source(folder / "model"), Target("cpu"), methods)
    wanted = {
        name: [x for x in unit.options if x != AS_STORED] for name, unit in choices.units.items()
    }
    work = folder / "work"
    work.mkdir()
    with Progress(disable=True) as bar:
        return choices, make_scores(choices, wanted, basis, work, bar)


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """FP8 with a scale a row, by its formula."""
    scale = weight.abs().amax(1, keepdim=True) / 448
    return (weight / scale).to(torch.float8_e4m3fn).float() * scale


def rounded_inputs(x: torch.Tensor) -> torch.Tensor:
    codes, scales = fp8_token(x.flatten(0, -2))
    return (codes * scales).view(x.shape)


def test_score_of_a_fused_module_is_that_of_autograd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With errors of weights and of inputs, rows of q, k and v summed, on held-out tokens alone."""
    model = write_model(tmp_path / "model")
    drawn: dict[int, torch.Tensor] = {}
    tokens: list[torch.Tensor] = []
    draw = Sweep._draw

    def kept(sweep: Sweep, window: int, logits: torch.Tensor) -> torch.Tensor:
        tokens[:] = [sweep._tokens]
        drawn[window] = draw(sweep, window, logits)
        return drawn[window]

    monkeypatch.setattr(Sweep, "_draw", kept)
    text = write_words(tmp_path / "text", 8 * 16)
    basis = Basis(text, windows=5, held_out=3, length=16)
    _, scores = scored(tmp_path, ("fp8_channel",), basis)
    sums = expected_sums(model, tokens[0], torch.stack([drawn[i] for i in range(8)]))
    for name, unit in (
        ("self_attn.qkv_proj", "qkv"),
        ("mlp.down_proj", "down"),
        ("mlp.gate_up_proj", "gate up"),
    ):
        for layer in range(3):
            key = f"model.layers.{layer}.{name}"
            parts = [sums[f"{key.rpartition('.')[0]}.{part}_proj"] for part in parts_of(unit)]
            held = sum(parts).view(8, 16)[5:, 1:]
            # a few changes are of more than a nat
            expected = float(torch.nn.functional.huber_loss(held, torch.zeros_like(held)))
            assert scores[key]["fp8_channel"] == pytest.approx(expected, rel=0.02)


def parts_of(unit: str) -> list[str]:
    return {"qkv": ["q", "k", "v"], "down": ["down"], "gate up": ["gate", "up"]}[unit]


def expected_sums(
    model: Any, tokens: torch.Tensor, labels: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Layer -> g'd of every token, d from rounding weights and inputs."""
    found: dict[str, torch.Tensor] = {}

    def watch(name: str, module: Any, inputs: Any, out: torch.Tensor) -> None:
        # as a served model has them
        x, weight = inputs[0].detach().bfloat16().float(), module.weight.detach()
        d = rounded_inputs(x) @ rounded(weight).t() - x @ weight.t()
        out.register_hook(lambda g: found.update({name: (g * d).sum(-1).flatten()}))

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_hook(functools.partial(watch, name))
    torch.nn.functional.cross_entropy(
        model(tokens).logits.flatten(0, 1), labels.flatten(), reduction="sum"
    ).backward()
    return found


def test_score_is_the_divergence_that_the_error_causes(tmp_path: Path) -> None:
    """Of texts of one token, whose positions are independent as the scores take them to be."""
    model = write_model(tmp_path / "model")
    count = 1500
    text = write_words(tmp_path / "text", count)
    basis = Basis(text, windows=8, held_out=count - 8, length=1)
    # weight-only, in steps small enough for a second order
    _, scores = scored(tmp_path, ("gptq",), basis)
    tokens = torch.arange(3, VOCABULARY)[:, None]
    log_p = predictions(model, tokens)
    for name in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj"):
        weight = model.get_submodule(name).weight
        before = weight.detach().clone()
        with torch.no_grad():
            weight.copy_(nearest_of_4_bits(before, 32))
        log_q = predictions(model, tokens)
        with torch.no_grad():
            weight.copy_(before)
        kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
        # labels are drawn, and so are tokens
        assert scores[name]["gptq-4bit-g32-nearest"] == pytest.approx(kl, rel=0.25)


def predictions(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(tokens).logits.double().log_softmax(-1)
    return found


def nearest_of_4_bits(weight: torch.Tensor, group: int) -> torch.Tensor:
    """Symmetric codes -8..7, by the description in `quantize.rounding`, written again."""
    x = weight.view(len(weight), -1, group)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    sign = torch.where(high > -low, -1.0, 1.0)
    larger, smaller = torch.maximum(high, -low), torch.minimum(high, -low)
    scale = torch.maximum(larger / 8.5, smaller.clamp(min=0) / 7.5).bfloat16().float() * sign
    return ((x / scale).round().clamp(-8, 7) * scale).view(weight.shape)


def test_without_gradients_it_is_the_share_of_the_outputs_that_is_error(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    text = write_words(tmp_path / "text", 8 * 16)
    basis = Basis(text, windows=5, held_out=3, length=16, gradients=False)
    _, scores = scored(tmp_path, ("fp8_channel",), basis)
    found: dict[str, Any] = {}

    def watch(name: str, module: Any, inputs: Any, out: torch.Tensor) -> None:
        x = inputs[0].bfloat16().float()
        d = rounded_inputs(x) @ rounded(module.weight).t() - x @ module.weight.t()
        found[name] = d[:, 1:].square().sum(), out[:, 1:].square().sum()

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_hook(functools.partial(watch, name))
    with torch.no_grad():
        model(held_tokens(text))
    for name in ("model.layers.1.self_attn.o_proj", "model.layers.2.mlp.down_proj"):
        error, outputs = found[name]
        expected = float(error / outputs)
        assert scores[name]["fp8_channel"] == pytest.approx(expected, rel=0.02)


def held_tokens(text: Path) -> torch.Tensor:
    """Of eight windows of 16, those that are held out: windows 2, 5 and 7."""
    words = [int(word[1:]) for word in text.read_text(encoding="utf-8").split()]
    return torch.tensor(words).view(8, 16)[[2, 5, 7]]


def test_single_experts_are_scored_and_those_without_tokens_are_not_free(tmp_path: Path) -> None:
    write_model(tmp_path / "model", "qwen3_moe")
    text = write_words(tmp_path / "text", 4 * 8)
    choices, scores = scored(tmp_path, ("awq",), Basis(text, windows=2, held_out=2, length=8))
    experts = [name for name in choices.units if ".experts." in name]
    assert len(experts) == 3 * 4
    assert scores.keys() == choices.units.keys()
    for name in experts:
        assert all(score > 0 for score in scores[name].values()), name
