"""What verbs print fits 80 and 120 columns with every name whole, and is not broken in a pipe."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest

from mixedprec_plugin.cli.main import main
from mixedprec_plugin.plan.tables import Page, Table
from tests import published

VERBS = [
    "plan --model MODEL --preset qwen3-30b-a3b --gpu H100",
    "plan --model MODEL --preset int8-channel",
    "inspect MODEL",
    "methods",
    "methods gptq",
    "presets",
    "diff awq gptq --model MODEL",
    "explain model.layers.0.mlp.experts.17.down_proj --model MODEL --preset qwen3-30b-a3b",
    "serve qwen3-30b-a3b --model MODEL --check --port 0 --gpu H100",
]
LAYER = re.compile(r"(?:model\.(?:layers|embed|norm)|lm_head)\S*")


class Terminal(io.StringIO):
    """A terminal as far as a program asks."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3-30B-A3B's headers, two blocks of it."""
    return published.qwen3_30b_a3b(2).write(tmp_path_factory.mktemp("models") / "qwen3")


def _printed(verb: str, model: Path, out: io.StringIO) -> list[str]:
    words = [str(model) if word == "MODEL" else word for word in verb.split()]
    assert main(words, out, io.StringIO()) == 0
    return re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()).splitlines()


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("columns", [80, 120])
def test_lines_fit_the_terminal_and_cut_no_name(
    verb: str, columns: int, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    shown = _printed(verb, model, Terminal())
    longer = [line for line in shown if len(line) > columns]
    # a command is to be copied, and what has no space cannot be broken
    assert [line for line in longer if not line.startswith("$ ") and " " in line.strip()] == []
    piped = _printed(verb, model, io.StringIO())
    assert set(LAYER.findall("\n".join(piped))) == set(LAYER.findall("\n".join(shown)))


@pytest.mark.parametrize("verb", VERBS)
def test_a_pipe_gets_whole_lines(verb: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    wide = _printed(verb, model, Terminal())
    monkeypatch.setenv("COLUMNS", "40")
    assert _printed(verb, model, io.StringIO()) == wide


@pytest.mark.slow
def test_rows_of_eval_fit_80_columns() -> None:
    # they import transformers
    from mixedprec_plugin.evaluate.divergence import Divergence, Mean
    from mixedprec_plugin.evaluate.report import Row, print_rows

    found = Divergence(Mean(0.1759, 0.0114), Mean(3.51, 0.07), Mean(0.7534, 0.0235), (0.1, 0.2))
    rows = [Row(name, 5.34, 1, found) for name in ("(unquantized)", "a-preset-of-mine-in-4-bits")]
    out = io.StringIO()
    print_rows(rows, Path("page.txt"), Page(out, 80))
    assert max(map(len, out.getvalue().splitlines())) <= 80
    assert "a-preset-of-mine-in-4-bits" in out.getvalue()


def test_last_column_of_words_is_wrapped_before_rows_are_stacked() -> None:
    table = Table(("name", False), ("what it does", False))
    table.add("a-name", "one two three four five six seven eight nine ten eleven")
    assert [line for line, _ in table.lines(44)] == [
        "name    what it does",
        "------  ------------------------------------",
        "a-name  one two three four five six seven",
        "        eight nine ten eleven",
    ]


def test_words_that_are_longer_than_the_terminal_stay_whole() -> None:
    table = Table(("name", False), ("number", True))
    table.add("x" * 50, "1")
    assert "x" * 50 in [line for line, _ in table.lines(20)]
