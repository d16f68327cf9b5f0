from __future__ import annotations

from pathlib import Path

import pytest

from mixedprec_plugin.plan.matching import match_rules, names_from_end
from tests.presets import preset

NAMES = [f"model.layers.{n}.mlp.up_proj" for n in range(12)] + ["model.norm", "lm_head"]


def matched(folder: Path, pattern: str) -> set[str]:
    rules = preset(folder, f'match: "{pattern}", method: fp8').rules
    return {name.split(".")[2] for name in match_rules(rules, NAMES).matched[0]}


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [
        ("model.layers.-1.*", {"11"}),
        ("*.layers.{-2..-1}.*", {"10", "11"}),
        ("*.layers.{0,1,-1}.*", {"0", "1", "11"}),
        ("*.layers.{0..3}.*", {"0", "1", "2", "3"}),
        ("*.layers.1.*", {"1"}),
        ("*.layers.-13.*", set()),
    ],
)
def test_layers_can_be_counted_from_the_end(tmp_path: Path, pattern: str, layers: set[str]) -> None:
    assert matched(tmp_path, pattern) == layers


def test_stacks_of_layers_are_counted_apart() -> None:
    names = ["model.layers.1.a", "visual.blocks.3.a", "visual.blocks.0.a", "model.norm"]
    assert names_from_end(names) == {
        "model.layers.1.a": "model.layers.-1.a",
        "visual.blocks.3.a": "visual.blocks.-1.a",
        "visual.blocks.0.a": "visual.blocks.-4.a",
    }


def test_only_the_first_number_is_counted_from_the_end() -> None:
    names = ["l.0.experts.0.w", "l.0.experts.7.w", "l.1.experts.7.w"]
    assert names_from_end(names)["l.1.experts.7.w"] == "l.-1.experts.7.w"
