"""Sources that change while they are converted: nothing is published, whatever their times say."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mixedprec_plugin.checkpoint.headers import StoredTensor
from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.convert import converter
from tests.commands import convert
from tests.convert.folders import contents, passes_for_whole

PART = "model-00001-of-00003.safetensors"


def rewrite(path: Path, data: bytes) -> None:
    """Change a file in place and set its times back."""
    before = path.stat()
    with path.open("r+b") as file:
        file.write(data)
        file.truncate()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def flip(path: Path, offset: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    rewrite(path, data)


def edit_config(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    rewrite(model / "config.json", json.dumps(config | {"rms_norm_eps": 2e-5}).encode())


def move_tensor(model: Path) -> None:
    """An index that takes one tensor from another file."""
    index = json.loads((model / "model.safetensors.index.json").read_text())
    (model / "other.safetensors").write_bytes((model / PART).read_bytes())
    name = next(name for name, file in index["weight_map"].items() if file == PART)
    index["weight_map"][name] = "other.safetensors"
    rewrite(model / "model.safetensors.index.json", json.dumps(index).encode())


Change = Callable[[Path], object]
CHANGES: dict[str, tuple[Change, str]] = {
    "weights": (lambda model: flip(model / PART), PART),
    "weights-replaced": (lambda model: replace(model / PART), PART),
    "config": (edit_config, "config.json"),
    "index": (move_tensor, "model.safetensors.index.json"),
    "tokenizer": (lambda model: rewrite(model / "tokenizer.json", b"[]"), "other files"),
    "tokenizer-gone": (lambda model: (model / "tokenizer.json").unlink(), "other files"),
    "template-new": (lambda model: (model / "chat.jinja").write_text("x"), "other files"),
}


def replace(path: Path) -> None:
    """Put another file in the place of one, with the same size and times."""
    before = path.stat()
    other = path.with_name("new")
    other.write_bytes(path.read_bytes()[:-1] + b"\x01")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.rename(path)


@pytest.fixture
def after_first_part(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Let something happen once the first part is written."""

    def plan(happening: Callable[[], object]) -> None:
        original, done = converter.write_part, []

        def write_part(*args: object) -> object:
            written = original(*args)  # type: ignore[arg-type]
            if not done:
                done.append(happening())
            return written

        monkeypatch.setattr(converter, "write_part", write_part)

    return plan


@pytest.mark.parametrize("kind", CHANGES)
def test_source_that_changes_meanwhile_is_an_error_and_nothing_is_published(
    model: Path, preset: Path, tmp_path: Path, kind: str,
    after_first_part: Callable[[Callable[[], object]], None],
) -> None:  # fmt: skip
    change, named = CHANGES[kind]
    after_first_part(lambda: change(model))
    out = tmp_path / "out"
    code, _, err = convert(model, preset, out, "--max-shard-size", "300KB")
    assert code == 1
    assert "changed while it was read" in err
    assert named in err
    assert "run it again with --overwrite once nothing writes to it" in err
    assert not passes_for_whole(out)
    assert convert(model, preset, out, "--max-shard-size", "300KB", "--overwrite")[0] == 0
    assert convert(model, preset, tmp_path / "fresh", "--max-shard-size", "300KB")[0] == 0
    assert contents(out) == contents(tmp_path / "fresh")


def test_source_that_is_only_touched_and_given_away_is_the_same(
    model: Path, preset: Path, tmp_path: Path
) -> None:
    assert convert(model, preset, tmp_path / "out")[0] == 0
    (model / PART).chmod(0o600)
    os.utime(model / PART)
    code, text, _ = convert(model, preset, tmp_path / "out")
    assert code == 0
    assert "1 of them from before" in text


@pytest.fixture
def stopped(model: Path, preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A conversion that was stopped after two parts."""
    original, count = converter.write_part, []

    def write_part(*args: object) -> object:
        if len(count) == 2:
            raise KeyboardInterrupt
        count.append(1)
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(converter, "write_part", write_part)
    assert convert(model, preset, tmp_path / "out", "--max-shard-size", "300KB")[0] == 130
    monkeypatch.undo()
    return tmp_path / "out"


def first_tensor(model: Path, stopped: Path) -> StoredTensor:
    """A tensor that a finished part was made of."""
    lines = (stopped / ".mixedprec-partial" / "journal.jsonl").read_text().splitlines()
    name = json.loads(lines[1])["provenance"][0]["tensors"][0]["name"]
    return open_source(model).tensors[name]


def test_source_that_changed_between_two_runs_is_not_mixed(
    model: Path, preset: Path, stopped: Path
) -> None:
    tensor = first_tensor(model, stopped)
    header = 8 + int.from_bytes(tensor.path.read_bytes()[:8], "little")
    flip(tensor.path, header + tensor.start)
    flags = (model, preset, stopped, "--max-shard-size", "300KB")
    code, _, err = convert(*flags)
    assert code == 1
    assert "holds an unfinished conversion of other inputs (the sources' files changed)" in err
    assert convert(*flags, "--overwrite")[0] == 0


def test_conversion_is_continued_where_a_source_was_only_touched(
    model: Path, preset: Path, stopped: Path
) -> None:
    os.utime(first_tensor(model, stopped).path)
    code, text, _ = convert(model, preset, stopped, "--max-shard-size", "300KB")
    assert code == 0
    assert "2 of them from before" in text


def test_finished_output_is_not_taken_for_that_of_a_source_with_other_bytes(
    model: Path, preset: Path, tmp_path: Path
) -> None:
    convert(model, preset, tmp_path / "out")
    flip(model / PART)
    code, _, err = convert(model, preset, tmp_path / "out")
    assert code == 1
    assert "holds a conversion of other inputs (the sources' files changed)" in err


@pytest.mark.parametrize("name", [PART, "config.json"])
def test_source_that_changes_before_the_work_is_an_error(
    model: Path, preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from mixedprec_plugin.cli import convert as verb

    original = verb.make_plan

    def make_plan(args: object) -> object:
        plan = original(args)  # type: ignore[arg-type]
        flip(model / name)
        return plan

    monkeypatch.setattr(verb, "make_plan", make_plan)
    code, _, err = convert(model, preset, tmp_path / "out")
    assert code == 1
    assert f"{name}: changed while it was read; run it again" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["gone", "cut", "folder"])
def test_weights_that_go_away_meanwhile_are_an_error(
    model: Path, preset: Path, tmp_path: Path, how: str,
    after_first_part: Callable[[Callable[[], object]], None],
) -> None:  # fmt: skip
    def spoil() -> None:
        for path in model.glob("*.safetensors"):
            if how == "cut":
                os.truncate(path, 1000)
                continue
            path.unlink()
            if how == "folder":
                path.mkdir()

    after_first_part(spoil)
    code, _, err = convert(model, preset, tmp_path / "out", "--max-shard-size", "300KB")
    assert code == 1
    assert ".safetensors: " in err
    assert "it changed while it was read" in err or "cannot be read" in err
    assert not passes_for_whole(tmp_path / "out")


def test_tokenizer_that_changed_since_is_another_input(
    model: Path, preset: Path, tmp_path: Path
) -> None:
    convert(model, preset, tmp_path / "out")
    (model / "tokenizer.json").write_text("[]")
    code, _, err = convert(model, preset, tmp_path / "out")
    assert code == 1
    assert "holds a conversion of other inputs (the model's other files changed)" in err
    assert convert(model, preset, tmp_path / "out", "--overwrite")[0] == 0
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "[]"
