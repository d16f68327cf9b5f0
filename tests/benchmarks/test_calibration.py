"""`benchmarks.calibration`: what it keeps, and what it makes of numbers."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from benchmarks import calibration
from benchmarks.calibration import Bench
from benchmarks.calibration_models import AWQ, GPTQ, SUBJECTS, Subject, skew
from benchmarks.calibration_page import MANUAL, asked, ratio, table
from benchmarks.rounding_peers import PEERS, PeerError
from mixedprec_plugin.errors import MixedPrecisionError
from tests.calibrate.models import SIZES, write_model


def a_row(*windows: float) -> dict[str, object]:
    return {MANUAL: {"windows": list(windows)}}


def test_error_of_a_ratio_is_of_pairs_of_windows() -> None:
    # twice as much in every window: no error, however the windows differ
    assert ratio(a_row(2, 6), a_row(1, 3), MANUAL) == (2, 0)
    # residuals -1 and 1 about a share of 1: variance 2 / (2 * 1), over the mean of 2
    assert ratio(a_row(1, 3), a_row(2, 2), MANUAL) == pytest.approx((1, 0.5))
    assert ratio(a_row(1, 3), {}, MANUAL) is None


def test_what_was_not_measured_says_so() -> None:
    rows = {f"{AWQ} | calibrated": a_row(1, 1), f"{AWQ} | nearest": a_row(4, 4)}
    lines = asked(rows).splitlines()
    assert lines[2] == "| AWQ, of nearest | manual | 0.40 | 0.250 ± 0.000 |"
    assert lines[4] == "| AWQ, of AutoAWQ's | manual | 0.70 | not measured |"
    failed = {f"{AWQ} | AutoAWQ": {"why": "not finished in 60 minutes"}}
    said = table(SUBJECTS[0], failed)
    assert "| awq, groups of 64 | AutoAWQ: not finished in 60 minutes |" in said
    assert "| gptq, groups of 64 | calibrated: not measured |" in said


def test_skewed_router_chooses_its_last_expert_rarely() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1000, 64, generator=generator) + 1
    router = torch.randn(4, 64, generator=generator)
    before, after = (
        (inputs @ one.t()).topk(2).indices.eq(3).any(1).float().mean()
        for one in (router, skew(router, inputs))
    )
    assert before > 0.2
    assert after < 0.01


def test_stopped_it_goes_on_and_measures_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(folder: Path) -> Path:
        write_model(folder, sizes={**SIZES, "hidden_size": 64, "intermediate_size": 128})
        return folder

    variants = [(AWQ, "nearest"), (AWQ, "calibrated"), (GPTQ, "nearest"), (GPTQ, "GPTQModel")]
    subject = Subject("small", "Small", build, variants, ["--windows", "4"])
    monkeypatch.setattr(calibration, "OWN_SIZE", ("--windows", 2, "--length", 16, "--seed", 1))
    peer = next(peer for peer in PEERS if peer.title == "GPTQModel")

    def fail(*_: object) -> Path:
        raise PeerError("not finished in 60 minutes")

    monkeypatch.setattr(type(peer), "is_installed", lambda _: True)
    monkeypatch.setattr(type(peer), "make", fail)
    first = list(itertools.islice(Bench(tmp_path, 2, 32).parts(subject), 3))
    assert first == [f"Small: {AWQ} | nearest", f"Small: {AWQ} | calibrated",
                     f"Small: {GPTQ} | nearest"]  # fmt: skip
    bench = Bench(tmp_path, 2, 32)
    rest = list(bench.parts(subject))
    assert rest == [f"Small: {GPTQ} | GPTQModel", "Small: manual, 3 checkpoints",
                    "Small: code, 3 checkpoints", "Small: own text, 3 checkpoints"]  # fmt: skip
    monkeypatch.setattr(calibration, "run", lambda *_: pytest.fail("it runs a verb again"))
    again = Bench(tmp_path, 2, 32)
    assert (list(again.parts(subject)), again.rows) == ([], bench.rows)
    row = again.rows["Small"][f"{AWQ} | calibrated"]
    assert 0 < row["own text"]["kl"]["value"] < 10
    assert row["seconds"] > 0


def test_a_verb_that_fails_ends_it() -> None:
    with pytest.raises((SystemExit, MixedPrecisionError)):
        calibration.run("convert", "--model", "/nowhere", "--out", "/nowhere")
