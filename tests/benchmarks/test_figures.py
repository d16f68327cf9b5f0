"""`benchmarks.figures`: the table, JSON and plot of all parts."""

from __future__ import annotations

import json
import xml.etree.ElementTree
from pathlib import Path

import pytest

from benchmarks.figures import Figure, keep, read


def test_a_part_measured_again_replaces_its_rows_alone(tmp_path: Path) -> None:
    file = tmp_path / "build" / "bench.json"
    assert keep("plan", [Figure("headers, s", 0.8)], file)
    assert not keep("loading", [Figure("warm, s", 3.0, 2.0, 2.5)], file)
    assert keep("plan", [Figure("headers, s", 0.5, 2.0, 0.5)], file)
    assert json.loads(file.read_text(encoding="utf-8")) == [
        {"part": "plan", "figure": "headers, s", "ours": 0.5, "peer": 2.0, "ratio": 0.25,
         "limit": 0.5},
        {"part": "loading", "figure": "warm, s", "ours": 3.0, "peer": 2.0, "ratio": 1.5,
         "limit": 2.5},
    ]  # fmt: skip
    assert read(file)["loading"] == [Figure("warm, s", 3.0, 2.0, 2.5)]


def test_the_table_says_what_is_over_its_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = [Figure("a", 3.0, 2.0, 2.5), Figure("b", 1.0)]
    assert not keep("loading", figures, tmp_path / "bench.json")
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["loading", "ours", "peer", "ratio", "limit"],
        ["a", "3", "2", "1.50", "2.5", "over"],
        ["b", "1", "-", "-", "-"],
    ]


def test_a_bar_is_as_long_as_ours_of_the_limit(tmp_path: Path) -> None:
    figures = [Figure("x < y", 1.0, limit=2.0), Figure("z", 2.0, 2.0), Figure("alone", 1.0)]
    keep("part", figures, tmp_path / "bench.json")
    root = xml.etree.ElementTree.parse(tmp_path / "bench.svg").getroot()
    svg = "{http://www.w3.org/2000/svg}"
    half, whole = (float(bar.attrib["width"]) for bar in root.iter(f"{svg}rect"))
    assert whole == 2 * half
    said = [text.text for text in root.iter(f"{svg}text")]
    assert said == ["part", "x < y", "0.50 of limit", "z", "1.00 of peer"]
