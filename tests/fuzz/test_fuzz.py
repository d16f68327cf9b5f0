from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.fuzz.campaign import Campaign
from tests.fuzz.case import Case, TooLongError, read_case, run_case, time_limit
from tests.fuzz.seeds import presets, seeds

CORPUS = sorted((Path(__file__).parent / "corpus").glob("*.json"))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("path", CORPUS, ids=[path.stem for path in CORPUS])
def test_input_that_was_a_finding_ends_in_success_or_an_error_of_ours(
    tmp_path: Path, path: Path
) -> None:
    outcome = run_case(read_case(path), tmp_path / "input")
    assert not outcome.finding, outcome.details


def test_every_seed_is_valid(tmp_path: Path) -> None:
    found = [
        run_case(Case(("inspect", "model"), files), tmp_path / "input")
        for files in seeds(tmp_path / "input")
    ]
    assert [outcome.words for outcome in found if outcome.code] == []
    assert len(found) > 20


def test_some_hundred_changed_inputs_end_in_success_or_an_error_of_ours(tmp_path: Path) -> None:
    campaign = Campaign(tmp_path / "input", random.Random(0))
    campaign.run(seconds=60, num=300)
    found = [f"{finding}\n{outcome.details}" for finding, (_, outcome) in campaign.findings.items()]
    assert found == []
    # the changes are small enough to pass, and large enough not to
    assert min(campaign.counts[0], campaign.counts[1]) > 20
    assert len(campaign.kept[0]) > 3


def test_case_is_read_as_it_was_written(tmp_path: Path) -> None:
    case = Case(("plan", "--model", "model"), {"a/b.json": (b"{",), "c": (b"\xff\x00", b"\x01")})
    (tmp_path / "case.json").write_text(case.as_text())
    again = read_case(tmp_path / "case.json")
    assert again.argv == case.argv
    assert {n: b"".join(x) for n, x in again.files.items()} == {
        n: b"".join(x) for n, x in case.files.items()
    }


def test_what_is_no_error_of_ours_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = presets()[0]
    case = Case(("plan", "--model", "model", "--preset", "p.yaml"), {"p.yaml": (preset,)})
    assert run_case(case, tmp_path / "input").finding == ""
    monkeypatch.setattr("mixedprec_plugin.cli.planning.open_source", lambda _: 1 / 0)
    outcome = run_case(case, tmp_path / "input")
    assert outcome.finding.startswith("ZeroDivisionError mixedprec_plugin/cli/planning.py:")


def spin() -> None:
    while True:
        pass


def test_too_long_a_time_is_stopped() -> None:
    with pytest.raises(TooLongError), time_limit(0.05):
        spin()
