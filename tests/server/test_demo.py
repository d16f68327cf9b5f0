"""The demo, whole: what it shows, and that what it says to type next works."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from demo.run import TEXT

pytestmark = [pytest.mark.sglang, pytest.mark.slow]


@dataclasses.dataclass
class Shown:
    """What the demo printed, and what waiting for it was told."""

    out: str
    err: str

    def commands(self) -> list[list[str]]:
        """Those to type next."""
        return [shlex.split(line) for line in self.out.rpartition("\n== Next")[2].splitlines()[1:]]


@pytest.fixture(scope="module")
def shown(widened_model: Path) -> Shown:
    done = subprocess.run([sys.executable, "-m", "demo.run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Shown(done.stdout, done.stderr)


def test_says_that_it_runs_on_a_cpu(shown: Shown) -> None:
    assert shown.out.startswith("Running on the CPU: there is no GPU here.")


def test_unquantized_answer_stands_beside_the_mixed_one(shown: Shown) -> None:
    mixed = re.search(r"^mixed, served +(.+)$", shown.out, re.M)
    unquantized = re.search(r"^unquantized +(.+)$", shown.out, re.M)
    assert mixed
    assert "Paris" in mixed[1]
    assert unquantized
    assert unquantized[1] == "The capital of France is Paris."


def test_divergence_and_perplexity_of_both_are_shown(shown: Shown) -> None:
    rows = re.findall(r"^(\S+) +\d+\.\d+ +([\d.]+) ± [\d.]+ +([\d.]+) ± ", shown.out, re.M)
    (name, own, _), (preset, kl, perplexity) = rows
    assert (name, float(own)) == ("(unquantized)", 0)
    assert preset == "attention-fp8-mlp-int4"
    assert 0.01 < float(kl) < 0.5
    assert float(perplexity) < 200


def test_waiting_tells_seconds(shown: Shown) -> None:
    assert "waiting for the server:   0 s" in shown.err


def test_commands_to_type_next_work(shown: Shown, tmp_path: Path) -> None:
    *commands, serve = shown.commands()
    assert [command[1] for command in commands] == ["presets", "plan", "explain", "eval"]
    assert serve[1] == "serve"
    for command in (*commands, [*serve, "--port", "0", "--check"]):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
    assert (tmp_path / "plan.html").read_text().startswith("<!")


def test_what_the_demo_measures_is_what_eval_does(shown: Shown, widened_model: Path) -> None:
    eval_command = next(command for command in shown.commands() if command[1] == "eval")
    assert eval_command[eval_command.index("--text") + 1] == str(TEXT)
    preset = next(c[3] for c in shown.commands() if c[1] == "presets")
    at = eval_command.index("mine.yaml")
    command = [*eval_command[:at], preset, *eval_command[at + 1 :], "--json"]
    rows = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["rows"]
    assert f"{rows[1]['found']['kl']['value']:.4f} ±" in shown.out
