"""Numbers of layers from elsewhere, over a plan."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mixedprec_plugin.errors import MixedPrecisionError
from mixedprec_plugin.plan.model import Plan
from mixedprec_plugin.plan.overlays import read_overlay
from tests.checkpoints import write_llama
from tests.commands import run
from tests.presets import plan, write_preset

_UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    model = write_llama(tmp_path_factory.mktemp("llama") / "model")
    return plan(model, 'match: "*.mlp.*", method: awq', 'match: "*.self_attn.*", method: fp8')


def _file(folder: Path, data: Any) -> Path:
    path = folder / "numbers.json"
    path.write_text(json.dumps(data))
    return path


def test_what_verify_prints_is_read(made: Plan, tmp_path: Path) -> None:
    preset = write_preset(tmp_path, 'match: "*.mlp.*", method: awq')
    code, out, _ = run(
        "verify", "--model", made.source.path, "--preset", preset, "--reference", "model",
        "--device", "cpu", "--json",
    )  # fmt: skip
    assert code == 0
    path = tmp_path / "verify.json"
    path.write_text(out)
    overlay = read_overlay(path, made)
    assert overlay["name"] == "relative error"
    # a step is the range of 128 numbers, over 15: about a tenth of their size
    assert 0.05 < overlay["values"][_UP] < 0.2


def test_record_of_a_calibrated_folder_is_read(made: Plan, tmp_path: Path) -> None:
    record = {"layers": [{"layer": _UP, "loss": 0.25}, {"layer": "unseen", "loss": None}]}
    (tmp_path / "mixedprec_calibration.json").write_text(json.dumps(record))
    overlay = read_overlay(tmp_path, made)
    assert (overlay["unit"], overlay["values"]) == ("nats a token", {_UP: 0.25})


def test_score_is_that_of_the_planned_scheme_for_all_parts_of_a_unit(
    made: Plan, tmp_path: Path
) -> None:
    def key(method: str, **arguments: Any) -> str:
        return json.dumps([method, arguments, "model"], sort_keys=True)

    awq = {"bits": 4, "zero_point": True, "rounding": "nearest"}
    scores = {
        key("awq", group_size=128, **awq): 0.5, key("awq", group_size=64, **awq): 0.1,
        key("fp8"): 0.01, "no key": 3.0,
    }  # fmt: skip
    data = {"scores": {"model.layers.0.mlp.gate_up_proj": scores}, "facts": {"gradients": False}}
    overlay = read_overlay(_file(tmp_path, data), made)
    gate = _UP.replace("up_proj", "gate_proj")
    assert overlay["values"] == {_UP: 0.5, gate: 0.5}
    assert overlay["unit"] == "share of the outputs"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"totals": 3}, r"--overlay: .*numbers\.json has no numbers of layers: it has neither"),
        ({"layers": [{"layer": _UP, "bits": 4}]}, r"its layers have neither relative_error nor"),
        ({"layers": [{"layer": "other", "loss": 1.0}]}, r"names no layer of this model; name what"),
        ([1, 2], r"numbers\.json: is not a JSON object"),
    ],
)
def test_file_of_another_kind_is_named(made: Plan, tmp_path: Path, data: Any, message: str) -> None:
    with pytest.raises(MixedPrecisionError) as caught:
        read_overlay(_file(tmp_path, data), made)
    assert re.search(message, str(caught.value))
