"""KL of single units in a running engine, held against transformers with the same weights."""

from __future__ import annotations

import copy
import functools
import operator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.progress import Progress

from mixedprec_plugin.checkpoint.reader import Reader
from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.compose.stream import compose_layer
from mixedprec_plugin.errors import UsageError
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.plan.model import PlannedLayer
from mixedprec_plugin.search.candidates import Choices, find_choices
from mixedprec_plugin.search.kept import Basis
from mixedprec_plugin.search.measured import can_measure, measure_scores, unmeasured
from tests.calibrate.models import SIZES, VOCABULARY, write_model
from tests.checkpoints import write_llama
from tests.commands import converted
from tests.presets import write_preset
from tests.reference.dequantize import dequantize_method

WINDOWS, LENGTH = 2, 40
UNITS = (
    "model.layers.0.self_attn.qkv_proj", "model.layers.1.self_attn.o_proj",
    "model.layers.0.mlp.experts.2", "model.layers.2.mlp.experts.0",
)  # fmt: skip


def test_single_units_lose_in_the_engine_what_they_lose_in_transformers(tmp_path: Path) -> None:
    folder, text = tmp_path / "model", tmp_path / "text"
    # SGLang pads smaller experts on a CPU
    model = write_model(folder, "qwen3_moe", sizes={**SIZES, "moe_intermediate_size": 128})
    choices = find_choices(open_source(folder), Target("cpu", 2), ("awq", "gptq", "fp8_channel"))
    assert not unmeasured(choices)
    wanted = {
        name: [x for x in ("awq-4bit-g32-nearest", "awq-4bit-g64-nearest") if x in unit.options]
        for name, unit in choices.units.items()
        if name in UNITS
    }
    assert wanted.keys() == set(UNITS)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, VOCABULARY, (WINDOWS, LENGTH), generator=generator)
    tokens[0, 5] = VOCABULARY - 1  # reported by SGLang as another
    text.write_text(" ".join(f"w{token}" for token in tokens.flatten().tolist()))
    basis = Basis(text, held_out=WINDOWS, length=LENGTH, in_engine=True)
    with Progress(disable=True) as bar:
        made = functools.reduce(operator.or_, measure_scores(choices, wanted, basis, tmp_path, bar))
    expected = in_transformers(model, choices, wanted, tokens)
    assert {unit: set(own) for unit, own in made.items()} == {u: set(x) for u, x in wanted.items()}
    for unit, own in made.items():
        assert own == pytest.approx(expected[unit], rel=0.01, abs=1e-6), unit
        assert min(own.values()) > 1e-5


def in_transformers(
    model: Any, choices: Choices, wanted: dict[str, list[str]], tokens: torch.Tensor
) -> dict[str, dict[str, float]]:
    """The same by transformers in float32 and numpy's dequantized weights."""

    def predict(own: Any) -> torch.Tensor:
        with torch.no_grad():
            rows: torch.Tensor = own(tokens).logits[:, :-1].double().log_softmax(-1)
        return rows

    first = predict(model)
    found: dict[str, dict[str, float]] = {}
    with Reader() as reader:
        for unit, names in wanted.items():
            for name in names:
                changed = copy.deepcopy(model)
                for layer in choices.units[unit].options[name].layers:
                    place(changed, layer, reader)
                p, q = first, predict(changed)
                found.setdefault(unit, {})[name] = float((p.exp() * (p - q)).sum(-1).mean())
    return found


def place(model: Any, layer: PlannedLayer, reader: Reader) -> None:
    assert layer.scheme is not None
    tensors = {
        suffix: tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()
        for suffix, tensor in compose_layer(layer, Target("cpu", 2), reader).items()
    }
    weight = torch.from_numpy(
        np.ascontiguousarray(dequantize_method("awq", tensors, layer.scheme.arguments))
    )
    path, _, own = layer.name.partition(".mlp.experts.")
    if not own:
        model.get_submodule(layer.name).weight.data.copy_(weight)
        return
    # transformers keeps the experts of a layer in one tensor each, gate before up
    expert, projection = own.split(".")
    experts = model.get_submodule(f"{path}.mlp.experts")
    inner = experts.down_proj.shape[2]
    where = {
        "gate_proj": experts.gate_up_proj.data[int(expert), :inner],
        "up_proj": experts.gate_up_proj.data[int(expert), inner:],
        "down_proj": experts.down_proj.data[int(expert)],
    }
    where[projection].copy_(weight)


def test_what_quantizes_activations_or_needs_a_conversion_is_not_measured(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model")
    choices = find_choices(open_source(model), Target("cpu"), ("awq", "fp8_channel"))
    unit = choices.units["model.layers.0.self_attn.qkv_proj"]
    can = {name for name in unit.options if can_measure(unit, name)} - {"as stored"}
    assert can
    assert all(name.endswith("-nearest") and name.startswith("awq") for name in can)
    only = find_choices(open_source(model), Target("cpu"), ("fp8_channel",))
    assert set(unmeasured(only).values()) == {
        "all of its candidates quantize activations, or need a conversion"
    }


def test_a_model_that_is_quantized_is_refused(tmp_path: Path) -> None:
    preset = write_preset(tmp_path, 'match: "*.mlp.*", method: gptq')
    out = converted(write_llama(tmp_path / "model"), preset, tmp_path / "out")
    choices = find_choices(open_source(out), Target("cpu"), ("awq",))
    with pytest.raises(UsageError, match=r"is quantized itself .* search with --inputs"):
        unmeasured(choices)
