"""What every verb has in common: options, exit codes, where things are written."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mixedprec_plugin import __version__
from mixedprec_plugin.cli import inspect
from mixedprec_plugin.cli.main import VERBS, main
from tests.checkpoints import write_llama
from tests.commands import run
from tests.presets import write_preset


class Terminal(io.StringIO):
    """A text stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "model")


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_has_examples_of_itself(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, "--help"]) == 0
    _, _, examples = capsys.readouterr().out.partition("examples:\n")
    lines = examples.splitlines()
    assert lines
    assert any(line.startswith(f"  mixedprec {verb}") for line in lines)


def test_version_and_help_need_no_verb() -> None:
    assert run("-V") == run("--version") == (0, f"{__version__}\n", "")
    code, out, _ = run("--help")
    assert code == 0
    assert all(f"  {verb} " in out for verb in VERBS)
    assert run() == (2, "", out)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("plam",), "error: unknown verb 'plam' (expected init, "),
        (
            ("plan", "--modle", "x", "--preset", "y"),
            "unknown argument '--modle'; did you mean --model",
        ),
        (("plan", "--model", "x", "--presett", "y"), "unknown argument '--presett'; did you mean"),
        (("plan", "--mod", "x"), "error: unknown argument '--mod'; did you mean --model"),
        (("plan", "--preset", "x"), "error: the following arguments are required: --model; see "),
        (
            ("plan", "--model", "x", "--tp", "1", "--tp", "2"),
            "error: --tp: given twice: 1 and 2; see mixedprec plan --help",
        ),
        (("plan", "--model", "x", "--tp", "two"), "error: --tp: 'two' is not a number; see "),
        (("serve", "awq", "--model", "x", "--port", "x"), "--port: 'x' is not a number; see "),
        (("plan", "--model", "x", "--tp", "0"), "error: --tp: 0 is not positive; see "),
        (
            ("init", "--model", "x", "--fit", ""),
            "error: --fit: is empty; see mixedprec init --help",
        ),
        *(
            (
                (verb, "--model", "x", "--bits", bits),
                f"--bits: {bits} is not a number of bits (expected",
            )
            for verb in ("init", "search")
            for bits in ("nan", "inf", "1e308", "0")
        ),
        (("presets", "list", "awq"), "error: list: does not read 'awq'; leave it out"),
        (("presets", "show", "awq", "x"), "error: show: does not read 'x'; leave it out"),
        (
            ("presets", "copy", "awq", "--set", "a=b"),
            "copy: does not read '--set a=b'; leave it out",
        ),
        (("diff", "awq", "gptq", "--preset", "x"), "error: unknown argument '--preset'; did you"),
        (("plan", "--model", "x", "--json", "-q"), "not allowed with argument --json"),
    ],
)
def test_wrong_command_lines_are_one_sentence(argv: tuple[str, ...], message: str) -> None:
    code, out, err = run(*argv)
    if "--json" in argv:
        out, err = "", out
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1 or "--json" in argv


def test_options_that_may_be_repeated_are(model: Path, tmp_path: Path) -> None:
    preset = write_preset(tmp_path, 'match: "*.mlp.*", method: gptq')
    sets = ("--set", "rules.0.group_size=32", "--set", "rules.0.method=awq")
    code, out, err = run("plan", "--model", model, "--preset", preset, *sets)
    assert (code, err) == (0, "")
    assert "awq 4-bit g32" in out


def test_errors_of_presets_are_json_under_json(model: Path, tmp_path: Path) -> None:
    preset = write_preset(tmp_path, 'match: "*", method: fp9')
    code, out, err = run("plan", "--model", model, "--preset", preset, "--json")
    (problem,) = json.loads(out)["problems"]
    assert (code, err) == (1, "")
    assert problem["where"] == f"{preset}:3: rules[0].method"
    assert problem["rule"] == "schema-enum"


def test_quiet_prints_errors_alone(model: Path, tmp_path: Path) -> None:
    preset = write_preset(tmp_path, 'match: "*", method: gptq')
    argv = ("plan", "--model", model, "--preset", preset, "--quiet")
    assert run(*argv) == (0, "", "")
    code, out, err = run(*argv, "--set", "rules.0.match=*.nowhere")
    assert (code, out) == (1, "")
    assert err.startswith("mixedprec: error: ")


def test_errors_stay_out_of_a_redirected_output(model: Path, tmp_path: Path) -> None:
    preset = write_preset(tmp_path, 'match: "*.nowhere", method: gptq')
    code, out, err = run("plan", "--model", model, "--preset", preset)
    assert code == 1
    assert "nowhere" not in out
    assert "layers: " in out
    assert f"error: {preset}:3: rules[0]: '*.nowhere' matches no layer" in err


def test_an_interrupt_is_one_line_and_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect, "run", stopped)
    assert run("inspect", "x") == (130, "", "mixedprec: interrupted\n")


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_output_that_takes_nothing_is_no_traceback(unbuffered: str) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}

    def say(shell: str) -> tuple[int, str]:
        command = shell.replace("mixedprec", f"{sys.executable} -m mixedprec_plugin")
        done = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, env=environment
        )
        return done.returncode, done.stderr

    full = "mixedprec: error: the output: cannot be read or written (No space left on device)\n"
    assert say("mixedprec presets > /dev/full") == (1, full)
    assert say("mixedprec presets | true; exit ${PIPESTATUS[0]}") == (0, "")
    assert say("mixedprec presets show nope --json | true") == (0, "")
    assert say("mixedprec presets >&-") == (0, "")


def test_a_name_that_no_file_can_have_is_no_traceback() -> None:
    code, _, err = run("validate", "x" * 5000)
    assert code == 1
    assert err.endswith("x: cannot be read or written (File name too long)\n")


@pytest.mark.parametrize("no_color", ["", "1"])
def test_colours_are_for_terminals_and_no_color_is_obeyed(
    no_color: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    err = Terminal()
    assert main(["plan", "--model", "/nowhere", "--preset", "awq"], io.StringIO(), err) == 1
    assert ("\x1b[" in err.getvalue()) == (not no_color)
    assert "\x1b" not in run("plan", "--model", "/nowhere", "--preset", "awq")[2]


@pytest.mark.parametrize("width", [80, 120])
def test_the_plan_fits_a_terminal_and_cuts_no_name(
    width: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = write_preset(
        tmp_path, 'match: "*", method: gptq', 'match: "*.self_attn.*_proj", method: fp8_block'
    )
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    out = Terminal()
    assert main(["plan", "--model", str(model), "--preset", str(preset)], out, out) == 0
    table, _, _ = out.getvalue().partition("\n\n")
    assert max(map(len, table.splitlines())) <= width
    assert "model.layers.0-2.post_attention_layernorm" in table
    assert "model.layers.0-2.self_attn.qkv_proj" in table


def test_nothing_is_wrapped_in_a_pipe(tmp_path: Path) -> None:
    """Every row of a table is one line, however narrow the terminal beside it is."""
    model = write_llama(tmp_path / "model")
    preset = write_preset(tmp_path, 'match: "*.mlp.*", method: gptq')
    code = "import sys; from mixedprec_plugin.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "plan", "--model", str(model), "--preset", str(preset)]
    done = subprocess.run(command, capture_output=True, text=True, env={"COLUMNS": "40"})
    table, _, _ = done.stdout.partition("\n\n")
    assert all(
        line.startswith(("layers", "---", "model.", "lm_head")) for line in table.split("\n")
    )
    assert max(map(len, table.splitlines())) > 40


def test_listing_presets_imports_nothing_slow() -> None:
    """What makes a start slow is imported where it is needed."""
    code = (
        "import sys; from mixedprec_plugin.cli.main import main; main(['presets'])\n"
        "sys.exit(str({'torch', 'sglang', 'numpy', 'rich', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "set()\n"
