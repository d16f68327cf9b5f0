"""Presets that are found: what they match, and that they plan to what was chosen."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.names import compile_pattern
from mixedprec_plugin.preset.load import load_preset
from mixedprec_plugin.search.candidates import AS_STORED, Choices, find_choices
from mixedprec_plugin.search.write import Chosen, patterns, preset_text, publish
from tests.checkpoints import write_llama
from tests.published import qwen3_30b_a3b

DENSE = [
    f"model.layers.{layer}.{name}"
    for layer in range(12)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
]
EXPERTS = [
    f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj"
    for layer, expert in itertools.product(range(3), range(12))
    for name in ("gate", "up")
]
# numbers and words at one place, and more numbers than layers have
NAMES = [
    *DENSE, *EXPERTS, "lm_head", "model.a.1.b.2.c.3.d", "model.layers.x.mlp.up_proj", "model.norm",
]  # fmt: skip


@given(st.sets(st.sampled_from(NAMES), min_size=1))
def test_patterns_match_just_what_is_wanted(wanted: set[str]) -> None:
    made = patterns(sorted(wanted), NAMES)
    tests = [compile_pattern(pattern) for pattern in made]
    assert {name for name in NAMES if any(test(name) for test in tests)} == wanted


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (DENSE, ["model.layers.*.*"]),
        ([x for x in DENSE if "mlp" in x], ["model.layers.*.mlp.*"]),
        (
            [x for x in DENSE if "up" in x and x.split(".")[2] in "0 1 2 7 9"],
            ["model.layers.{{0..2},7,9}.mlp.up_proj"],
        ),
        (
            [x for x in EXPERTS if x.split(".")[5] in ("3", "4")],
            ["model.layers.*.mlp.experts.{3,4}.*"],
        ),
    ],
)
def test_layers_that_are_alike_are_one_pattern(wanted: list[str], expected: list[str]) -> None:
    assert patterns(wanted, [*DENSE] if wanted[0] in DENSE else EXPERTS) == expected


def dealt(choices: Choices, seed: int) -> dict[str, str]:
    """Some option for every unit."""
    generator = np.random.default_rng(seed)
    return {
        name: str(generator.choice(sorted(unit.options))) for name, unit in choices.units.items()
    }


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_preset_plans_to_what_was_chosen(tmp_path: Path, kind: str, seed: int) -> None:
    if kind == "dense":
        folder = write_llama(tmp_path / "model")
    else:
        folder = qwen3_30b_a3b(num_layers=2).write(tmp_path / "model")
    choices = find_choices(open_source(folder), Target("cuda", tp_size=2))
    choice = dealt(choices, seed)
    losses = dict.fromkeys(choice, 0.25)
    text = preset_text(choices, Chosen(choice, losses, ["about"]))
    path = tmp_path / "found.yaml"
    plan = publish(text, choices, choice, path)
    for unit, name in choice.items():
        for layer in choices.units[unit].layers:
            made = plan.by_name[layer.name]
            if name == AS_STORED:
                assert made.action == "as stored"
                continue
            scheme = choices.candidates[name].scheme
            assert made.scheme is not None
            assert made.method == scheme.method
            # what is left to the source is settled by it
            assert {k: made.scheme.arguments[k] for k, v in scheme.arguments.items() if v} == {
                k: v for k, v in scheme.arguments.items() if v
            }
    assert load_preset(path).warnings == ()
    assert list(tmp_path.glob(".*")) == []


def test_every_rule_says_what_it_takes_and_costs(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "model")
    choices = find_choices(open_source(folder), Target("cuda"), ("awq", "fp8_channel"))
    choice = {
        name: "fp8_channel" if "layers.2" in name else "awq-4bit-g128" for name in choices.units
    }
    text = preset_text(choices, Chosen(choice, dict.fromkeys(choice, 0.25), ["Purpose"]))
    # by hand: two layers of 589,824 weights in 4 + 20/128 bits; of the third, 196,608 bytes and a
    # float32 for each of 768 outputs, 393,216 bytes and one for each of 1,280
    assert text.splitlines()[0] == "# Purpose"
    assert text.split("rules:\n")[1] == (
        "  # 8 modules, 598.5 KiB, loss 2.0000\n"
        '  - {match: "*", scheme: awq-4bit-g128}\n'
        "  # 2 modules, 389.0 KiB, loss 0.5000\n"
        '  - {match: "model.layers.2.mlp.*", scheme: fp8_channel}\n'
        "  # 2 modules, 195.0 KiB, loss 0.5000\n"
        '  - {match: "model.layers.2.self_attn.*", scheme: fp8_channel}\n'
    )
