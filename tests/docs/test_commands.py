"""Every command that is shown to people does what it says, or is at least one."""

from __future__ import annotations

import importlib.util
import itertools
import json
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

from mixedprec_plugin.cli.main import VERBS, parser_of
from tests import published
from tests.checkpoints import write_llama
from tests.commands import run
from tests.docs.commands import PAGES, ROOT, Command, commands_of, examples, files_of

# what is not run here, but parsed; and why
NOT_RUN = {
    "eval": "runs whole models; tests/verify and tests/server do",
    "search": "runs whole models; tests/search does",
    "doctor": "imports SGLang; tests/cli/test_doctor.py does",
    "--calibrate": "runs a whole model; tests/calibrate does",
    "--build": "imports SGLang; tests/serving/test_plan_build.py does",
    "--draft-model": "needs two models; tests/serving/test_draft.py does",
    "http://127.0.0.1:30000": "asks a running server; tests/server/test_mixed.py does",
    "Qwen/Qwen3-30B-A3B-GPTQ-Int4": "is on the Hub; tests/checkpoint reads ids from its cache",
    "all.yaml": "names checkpoints of the reader's",
}
# what stands for a folder of the reader's
_FOLDERS = ("DIR", "MODEL", "BF16_DIR", "CONVERTED")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models under the names that pages call them by."""
    root = tmp_path_factory.mktemp("models")
    llama = write_llama(root / "llama")
    for name in _FOLDERS:
        (root / name).symlink_to(llama)
    published.llama_3_1_8b().write(root / "meta-llama" / "Llama-3.1-8B-Instruct")
    published.qwen3_30b_a3b(num_layers=2).write(root / "Qwen" / "Qwen3-30B-A3B")
    return root


@pytest.fixture
def desk(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to type in, with the models in it."""
    for entry in folders.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "presets").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MIXEDPREC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def prepare(desk: Path, commands: Iterable[Command]) -> None:
    """Write the files that commands take for granted."""
    written = {w for c in commands for flag, w in itertools.pairwise(c.words) if flag == "--out"}
    text = 'version: 1\nschemes: {mlp: {method: awq}}\nrules: [{match: "*.mlp.*", scheme: mlp}]\n'
    for name in {"mine.yaml", "PRESET", "presets/other.yaml"} - written:
        (desk / name).write_text(text)
    for name in ("page.txt", "FILE"):
        (desk / name).write_text("A page of text.")
    said = ("--model", "DIR", "--preset", "mine.yaml" if "mine.yaml" not in written else "awq")
    made = run("plan", *said, "--json")[1]
    (desk / "plan.json").write_text(made)
    layers = [{"layer": x["name"], "relative_error": 0.1} for x in json.loads(made)["layers"]]
    (desk / "errors.json").write_text(json.dumps({"layers": layers}))
    if "DIR-awq" not in written:
        assert run("convert", *said, "--device", "cpu", "--out", "DIR-awq")[0] == 0


def check(command: Command) -> None:
    """Run a command of ours, or hold it against the parser."""
    verb, words = command.words[1], list(command.words[2:])
    if verb == "serve":
        words += ["--check"] if "--check" not in words else []
    if NOT_RUN.keys() & command.words:
        parser_of(verb).parse_args(words)
        return
    if "*" in " ".join(words):  # the shell's
        words = [str(p) for w in words for p in (sorted(Path().glob(w)) if "*" in w else [w])]
    code, out, err = run(verb, *words)
    assert code == 0 or any("error:" in line for line in command.output), f"{command}\n{err}"
    for line in command.output:
        for piece in line.split(" … "):
            assert " ".join(piece.split()) in " ".join((out + err).split()), f"{command}: {piece}"


# README shows the plan of the demo's model, which is not the one here
_SHOWN_OF_ANOTHER_MODEL = {"README.md"}
# it shows numbers of a model with 18,000 layers
_OF_WHOLE_MODEL = "guide.md"


def _lines(page: Path) -> list[Command]:
    return [c for c in commands_of(page) if c.is_whole and c.words[0] == "mixedprec"]


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.name, marks=[pytest.mark.slow] * (page.name == _OF_WHOLE_MODEL))
        for page in filter(_lines, PAGES)
    ],
)
def test_commands_on_lines_of_their_own_run(page: Path, desk: Path) -> None:
    commands = _lines(page)
    if page.name == _OF_WHOLE_MODEL:
        (desk / "Qwen").unlink()
        published.qwen3_30b_a3b().write(desk / "Qwen" / "Qwen3-30B-A3B")
    prepare(desk, commands)
    for name, text in files_of(page).items():
        (desk / name).write_text(text)
    for command in commands:
        check(command._replace(output=()) if page.name in _SHOWN_OF_ANOTHER_MODEL else command)


@pytest.mark.parametrize("verb", VERBS)
def test_examples_of_help_run(verb: str, desk: Path) -> None:
    commands = [c for c in examples() if c.words[1] == verb]
    assert commands
    prepare(desk, commands)
    for command in commands:
        for flag, written in itertools.pairwise(command.words):
            if flag == "--out" and Path(written).is_dir():
                shutil.rmtree(written)
        check(command)


def _all() -> list[Command]:
    found = {c.words: c for page in PAGES for c in commands_of(page)}
    return list(found.values())


def test_commands_in_sentences_have_the_verbs_and_options_that_there_are() -> None:
    for command in _all():
        if command.words[0] == "mixedprec":
            known = {*parser_of(command.words[1]).option_strings}
            options = {w.partition("=")[0] for w in command.words if w.startswith("--")}
            passed_on = {"--mem-fraction-static"} if command.words[1] == "serve" else set()
            assert options <= known | passed_on, command


def test_make_has_the_targets_that_are_named() -> None:
    for command in _all():
        if command.words[0] == "make":
            done = subprocess.run(
                [*command.words, "-n"], cwd=ROOT, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{command}\n{done.stderr}"


def test_modules_that_are_run_are_there() -> None:
    for command in _all():
        if command.words[0] == "python":
            assert command.words[1] == "-m", command
            assert importlib.util.find_spec(command.words[2]), command


@pytest.mark.sglang
@pytest.mark.filterwarnings("ignore")  # of SGLang's imports
def test_servers_are_started_with_options_that_sglang_takes() -> None:
    import argparse

    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    load_plugins()  # as a server does first: our flags are there, too
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    known = set(parser._option_string_actions)
    for command in _all():
        if command.words[0] == "sglang" or command.words[:2] == ("mixedprec", "serve"):
            options = {w.partition("=")[0] for w in command.words if w.startswith("--")}
            assert options <= known | {"--model", "--gpu", "--check", "--set"}, command
