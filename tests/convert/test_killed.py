"""Conversions that are killed, with SIGKILL and wherever they are, and continued."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mixedprec_plugin.checkpoint.source import open_source
from tests.checkpoints import write_checkpoint, write_llama
from tests.commands import run
from tests.convert.folders import contents, passes_for_whole
from tests.presets import write_preset

pytestmark = pytest.mark.slow
NUM_KILLS = 20
NUM_LAYERS = 4
ROOT = Path(__file__).resolve().parents[2]


class Converter:
    """Runs conversions in processes that can be killed; see `tests.convert.forker`."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.convert.forker"], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def start(self, argv: list[str], stop_at: int = 0) -> int:
        """Start a conversion; return its process id."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"argv": argv, "stop_at": stop_at}) + "\n")
        self.process.stdin.flush()
        return int(self._answer()["pid"])

    def wait(self) -> tuple[int, float]:
        """Wait for the conversion; return its exit code, or minus the signal, and its seconds."""
        answer = self._answer()
        return os.waitstatus_to_exitcode(answer["status"]), answer["seconds"]

    def run(self, argv: list[str], stop_at: int = 0) -> tuple[int, float]:
        self.start(argv, stop_at)
        return self.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer


@pytest.fixture(scope="module")
def converter() -> Iterator[Converter]:
    made = Converter()
    yield made
    assert made.process.stdin is not None
    assert made.process.stdout is not None
    made.process.stdin.close()
    made.process.wait(timeout=60)
    made.process.stdout.close()


@pytest.fixture(scope="module")
def argv(original_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command line, but for --out: the first layers of the real model, in six methods."""
    folder = tmp_path_factory.mktemp("killed")
    config = json.loads((original_model / "config.json").read_text())
    names = [f"model.layers.{n}." for n in range(NUM_LAYERS)]
    tensors = {
        name: tensor
        for name, tensor in load_file(original_model / "model.safetensors").items()
        if not name.startswith("model.layers.") or name.startswith(tuple(names))
    }
    # most of the bytes, and no work
    config |= {"num_hidden_layers": NUM_LAYERS, "vocab_size": 4096}
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:4096].clone()
    model = write_checkpoint(folder / "model", config, tensors, parts=2)
    (model / "tokenizer.json").write_text("{}")
    preset = write_preset(
        folder, 'match: "*.{0..1}.*_proj", method: fp8', 'match: "*.2.*_proj", method: gptq_int8, '
        "group_size: 64",
        'match: "*.3.*_proj", method: awq, group_size: 64',
    )  # fmt: skip
    return ["convert", "--model", str(model), "--preset", str(preset), "--device", "cpu",
            "--max-shard-size", "3MB"]  # fmt: skip


def test_killed_at_random_moments_and_continued_it_writes_identical_files(
    converter: Converter, argv: list[str], tmp_path: Path
) -> None:
    times = []
    for name in ("whole", "again"):
        code, seconds = converter.run([*argv, "--out", str(tmp_path / name)])
        assert code == 0
        times.append(seconds)
    expected = contents(tmp_path / "whole")
    assert contents(tmp_path / "again") == expected
    chance = random.Random(20)
    out = tmp_path / "out"
    num_killed = num_unfinished = 0
    for _ in range(NUM_KILLS):
        shutil.rmtree(out, ignore_errors=True)
        process = os.pidfd_open(converter.start([*argv, "--out", str(out)]))
        time.sleep(chance.uniform(0, min(times)))
        with contextlib.suppress(ProcessLookupError):  # it was faster than usual
            signal.pidfd_send_signal(process, signal.SIGKILL)
        os.close(process)
        code, _ = converter.wait()
        num_killed += code == -signal.SIGKILL
        if passes_for_whole(out):
            assert {k: v for k, v in contents(out).items() if "/" not in k} == expected
        else:
            num_unfinished += 1
        assert converter.run([*argv, "--out", str(out)])[0] == 0
        assert contents(out) == expected
    assert num_killed > NUM_KILLS // 2
    assert num_unfinished > NUM_KILLS // 4


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    model = write_llama(tmp_path / "model", num_hidden_layers=1)
    (model / "tokenizer.json").write_text("{}")
    preset = write_preset(tmp_path, 'match: "*.mlp.*", method: fp8')
    return ["convert", "--model", str(model), "--preset", str(preset), "--device", "cpu",
            "--max-shard-size", "500KB"]  # fmt: skip


def test_killed_before_any_change_to_the_file_system_nothing_passes_for_whole(
    converter: Converter, small: list[str], tmp_path: Path
) -> None:
    assert converter.run([*small, "--out", str(tmp_path / "whole")])[0] == 0
    expected = contents(tmp_path / "whole")
    stop_at, code = 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        stop_at += 1
        out = tmp_path / f"out-{stop_at}"
        code, _ = converter.run([*small, "--out", str(out)], stop_at)
        if passes_for_whole(out):
            assert {k: v for k, v in contents(out).items() if "/" not in k} == expected
        assert converter.run([*small, "--out", str(out)])[0] == 0
        assert contents(out) == expected
    assert code == 0
    assert stop_at > 20


def test_killed_while_it_replaces_an_output_either_one_is_whole_or_none(
    converter: Converter, small: list[str], tmp_path: Path
) -> None:
    old, new = [*small, "--dtype", "float16"], [*small, "--overwrite"]
    for name, command in (("old", old), ("new", new)):
        assert converter.run([*command, "--out", str(tmp_path / name)])[0] == 0
    wholes = [contents(tmp_path / name) for name in ("old", "new")]
    out, stop_at, code = tmp_path / "out", 0, -signal.SIGKILL
    seen = set()
    while code == -signal.SIGKILL:
        stop_at += 1
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "old", out)
        code, _ = converter.run([*new, "--out", str(out)], stop_at)
        if passes_for_whole(out):
            found = {k: v for k, v in contents(out).items() if "/" not in k}
            assert found in wholes
            seen.add(wholes.index(found))
        else:
            seen.add(-1)
        assert converter.run([*new, "--out", str(out)])[0] == 0
        assert contents(out) == wholes[1]
    assert seen == {-1, 0, 1}


def test_part_that_changed_after_it_was_finished_is_written_anew(
    converter: Converter, small: list[str], tmp_path: Path
) -> None:
    assert converter.run([*small, "--out", str(tmp_path / "whole")])[0] == 0
    out = tmp_path / "out"
    stop_at = 1
    while len(list(out.glob(".mixedprec-partial/*.safetensors"))) < 2:
        shutil.rmtree(out, ignore_errors=True)
        assert converter.run([*small, "--out", str(out)], stop_at)[0] == -signal.SIGKILL
        stop_at += 1
    (part, *_) = sorted(out.glob(".mixedprec-partial/*.safetensors"))
    data = bytearray(part.read_bytes())
    data[-1] ^= 255
    part.write_bytes(data)
    assert converter.run([*small, "--out", str(out)])[0] == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_unfinished_conversion_of_other_inputs_is_not_continued(
    converter: Converter, small: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert converter.run([*small, "--out", str(out)], 8)[0] == -signal.SIGKILL
    other = [*small, "--dtype", "float16", "--out", str(out)]
    code, _, err = run(*other)
    assert code == 1
    assert (
        f"{out}: holds an unfinished conversion of other inputs (the dtype, the plan changed); add "
        "--overwrite to start over" in err
    )
    assert converter.run([*other, "--overwrite"])[0] == 0
    assert {t.dtype for t in open_source(out).tensors.values()} >= {"F16"}
