"""`mixedprec serve`: what it refuses before SGLang is imported, and what it becomes."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import published
from tests.checkpoints import write_llama
from tests.commands import converted, run, run_without_torch
from tests.presets import write_preset


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same on every machine."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "model")


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield listening.getsockname()[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_check_prints_the_command_and_hands_sglangs_options_on(model: Path) -> None:
    port = free_port()
    out = run_without_torch(
        "serve", "awq", "--model", model, "--tp", 2, "--set", "schemes.all.group_size=64",
        "--port", port, "--check", "--mem-fraction-static", "0.5", "--disable-radix-cache",
    )  # fmt: skip
    totals, where, command = out.splitlines()
    assert totals.startswith("29 layers: ")
    assert where == "no GPU: served by the CPU platform"
    dollar, program, *words = shlex.split(command)
    assert (dollar, Path(program).name) == ("$", "sglang")
    assert words == [
        "serve", "--model-path", str(model), "--load-format", "mixedprec",
        "--mixedprec-config", "awq", "--mixedprec-set", "schemes.all.group_size=64",
        "--tp-size", "2", "--mem-fraction-static", "0.5", "--host", "127.0.0.1",
        "--port", str(port), "--disable-radix-cache",
    ]  # fmt: skip


def test_a_preset_beside_is_handed_on_as_a_path(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_preset(tmp_path, 'match: "*", method: fp8')
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("serve", "preset", "--model", model, "--check", "--json",
                       "--port", free_port())  # fmt: skip
    command = json.loads(out)["command"]
    assert code == 0
    assert command[command.index("--mixedprec-config") + 1] == "preset.yaml"


def test_a_converted_folder_needs_no_preset(model: Path, tmp_path: Path) -> None:
    preset = write_preset(tmp_path, 'match: "*.mlp.*", method: awq')
    out = converted(model, preset, tmp_path / "out")
    code, text, _ = run("serve", "--model", out, "--check", "--port", free_port())
    assert code == 0
    assert "--mixedprec-config" not in text
    assert "--load-format mixedprec" in text


def test_a_port_that_is_taken_is_refused_with_a_free_one(model: Path, taken: int) -> None:
    code, out, err = run("serve", "awq", "--model", model, "--port", taken)
    assert (code, out) == (1, "")
    assert f"error: --port: {taken} is taken on 127.0.0.1; --port " in err
    free = int(err.split("--port ")[1].split()[0])
    assert free > taken


@pytest.mark.parametrize("option", ["--load-format=auto", "--load-f", "--mixedprec-config"])
def test_what_was_checked_is_what_is_served(model: Path, option: str) -> None:
    code, _, err = run("serve", "awq", "--model", model, "--check", option, "gptq")
    assert code == 2
    assert f"{option.partition('=')[0]}: is not handed on: " in err


def test_a_port_or_a_host_that_there_is_not_is_told_from_one_that_is_taken(model: Path) -> None:
    for port in ("65536", "-1"):
        code, _, err = run("serve", "awq", "--model", model, "--check", "--port", port)
        assert (code, f"--port: {port} is not a port" in err) == (2, True)
    # 192.0.2.0/24 is for documentation: no machine has one of these (RFC 5737)
    code, _, err = run("serve", "awq", "--model", model, "--check", "--host", "192.0.2.1")
    assert code == 1
    assert "--host: '192.0.2.1' cannot be listened on (Cannot assign requested address)" in err


def test_what_does_not_fit_the_card_is_refused(model: Path) -> None:
    code, _, err = run("serve", "fp8-block", "--model", model, "--gpu", "RTX 2080 Ti")
    assert code == 1
    assert "does not run on this GPU, whose compute capability is 7.5" in err


def test_the_lines_of_the_card_go_by_the_options(tmp_path: Path) -> None:
    folder = published.llama_3_1_8b().write(tmp_path / "model")
    preset = write_preset(tmp_path, 'match: "*_proj", method: fp8')
    words = ("serve", preset, "--model", folder, "--gpu", "RTX4080", "--check",
             "--port", free_port(), "--mem-fraction-static", 0.9)  # fmt: skip

    def tokens(*options: object) -> tuple[int, str]:
        code, out, err = run(*words, *options)
        assert code == 0, err
        # a tenth of 16 GB
        assert "1.6 GB  activations and CUDA graphs (--mem-fraction-static 0.9)" in out
        said, _, rest = out.split("KV cache: ")[1].split("\n")[0].partition(" tokens")
        return int(said.replace(",", "")), rest

    num, rest = tokens()
    assert rest == f", {num // 8192} requests of 8,192"
    halves, rest = tokens("--kv-cache-dtype", "fp8_e4m3", "--context-length", 2048)
    assert halves in (2 * num, 2 * num + 1)
    assert rest == f", {halves // 2048} requests of 2,048"
    assert tokens("--max-running-requests", 3, "--context-length", 1024)[1] == (
        ", 3 requests of 1,024"
    )
    code, _, err = run(*words[:-1], 0.55)
    assert code == 1
    assert "7.2 GB for activations and CUDA graphs leave no room for a KV cache" in err
    code, out, _ = run(*words[:-1], 0.55, "--pp-size", 2)
    assert code == 0
    assert "not checked, with --pp-size: whether it fits the memory" in out
    for option in ("--enable-dp-attention", "--cuda-graph-max-bs-decode=8"):
        code, out, _ = run(*words, option)
        assert code == 0
        assert f"not checked, with {option.partition('=')[0]}: " in out
        assert "KV cache" not in out
    code, _, err = run(*words[:-1], 1.5)
    assert code == 2
    assert err.startswith("mixedprec: error: --mem-fraction-static: 1.5 is not a fraction")


def test_a_longer_chunk_of_prefill_takes_from_the_cache(tmp_path: Path) -> None:
    folder = published.llama_3_1_8b().write(tmp_path / "model")
    words = ("serve", "awq", "--model", folder, "--gpu", "A6000", "--check", "--port", free_port())

    def reserve(*options: object) -> float:
        code, out, err = run(*words, *options)
        assert code == 0, err
        return float(out.split(" GB  activations")[0].split()[-1])

    # 4,096 tokens on such a card: 1.5 MiB each, and graphs of up to so many
    assert reserve("--chunked-prefill-size", 4096) == reserve()
    assert reserve("--chunked-prefill-size", 16384) > reserve() + 1.5 * 12288 * 2**20 / 1e9
    code, out, _ = run(*words, "--chunked-prefill-size", -1)
    assert code == 0
    assert "not checked, with --chunked-prefill-size" in out
    assert "--chunked-prefill-size -1" in out


def test_the_driver_names_the_card(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nvidia-smi's own output, of an H100."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 9.0'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.delenv("SGLANG_PLATFORM", raising=False)
    code, out, _ = run("serve", "awq", "--model", model, "--check", "--port", free_port())
    assert code == 0
    assert "H100 of 80 GB" in out


@pytest.mark.sglang
def test_it_becomes_sglang_serve_whose_help_has_our_flags(model: Path) -> None:
    code = "import sys; from mixedprec_plugin.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "serve", "awq", "--model", str(model), "--port",
               str(free_port()), "--", "--help"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--mem-fraction-static" in done.stdout
    assert done.stdout.count("--mixedprec-config PRESET") == 1
    assert "mixed precision (--load-format mixedprec):" in done.stdout
