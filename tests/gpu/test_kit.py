"""The kit for a bare machine: pieces, order, and what is left of a run that was cut off."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.gpu import kit
from tests.gpu.in_order import STEPS, Step, run


def test_pieces_are_small_and_make_up_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kit, "PIECE_BYTES", 7000)
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "numbers").write_bytes(bytes(range(256)) * 100)
    pieces = kit.pack(folder, tmp_path)
    assert len(pieces) > 3
    assert all(piece.stat().st_size <= 7000 for piece in pieces)
    subprocess.run("sha256sum -c --quiet SHA256SUMS", cwd=tmp_path, shell=True, check=True)
    subprocess.run("cat kit.tar.* | tar -x", cwd=tmp_path, shell=True, check=True)
    assert (tmp_path / "kit" / "numbers").read_bytes() == (folder / "numbers").read_bytes()


def test_sglang_is_packed_as_installed_and_torch_is_not() -> None:
    names = dict(text.split("==") for text in kit.requirements())
    assert names.keys() >= {"sglang", "sglang-kernel", "transformers", "pytest", "gguf"}
    assert not names.keys() & {"torch", "triton", "torchvision", "mixedprec-plugin"}


def test_what_fails_or_takes_too_long_leaves_what_was_measured(tmp_path: Path) -> None:
    steps = (
        Step("good", ("-c", "print('found')"), 1),
        Step("slow", ("-c", "print('begun', flush=True); import time; time.sleep(60)"), 0.02),
        Step("bad", ("-c", "raise SystemExit(3)"), 1),
        Step("late", ("-c", "print('never')"), 0),
    )
    assert run(steps, tmp_path, minutes=5) == 1
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    found = [(line["step"], line["code"]) for line in lines]
    assert found == [("good", 0), ("slow", 124), ("bad", 3), ("late", None)]
    assert (tmp_path / "slow.log").read_text() == "begun\n"


def test_every_step_names_files_that_are_there() -> None:
    root = Path(kit.__file__).resolve().parents[2]
    for step in STEPS:
        for name in step.arguments:
            assert "/" not in name or (root / name).is_file() or "\n" in name, name
