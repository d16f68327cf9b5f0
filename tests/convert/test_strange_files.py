"""What others put into a model's folder or into the output: links, pipes, damaged records."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pytest

from tests.commands import convert, converted
from tests.convert.folders import contents, passes_for_whole

WORK = ".mixedprec-partial"
NAMES = ("journal.jsonl", "stale.json", "stale.json.tmp", "files", "files/config.json",
         "model.safetensors", "model.safetensors.tmp")  # fmt: skip


def test_link_out_of_the_model_is_not_copied(model: Path, preset: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("TOP-SECRET")
    (model / "special_tokens_map.json").symlink_to(tmp_path / "secret")
    code, _, err = convert(model, preset, tmp_path / "out")
    assert code == 1
    assert "special_tokens_map.json: is a link out of its folder" in err
    assert not (tmp_path / "out").exists()
    # what the message says to do
    (model / "special_tokens_map.json").unlink()
    (model / "special_tokens_map.json").write_text("copied")
    assert convert(model, preset, tmp_path / "out")[0] == 0


def test_link_within_the_model_is_copied_as_a_file(
    model: Path, preset: Path, tmp_path: Path
) -> None:
    (model / "chat.jinja").symlink_to("tokenizer.json")
    out = converted(model, preset, tmp_path / "out")
    assert (out / "chat.jinja").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert not (out / "chat.jinja").is_symlink()


def test_pipe_among_the_models_files_is_not_waited_for(
    model: Path, preset: Path, tmp_path: Path
) -> None:
    os.mkfifo(model / "tokenizer.model")
    (model / "merges.txt").symlink_to("tokenizer.model")
    out = converted(model, preset, tmp_path / "out")
    assert not (out / "tokenizer.model").exists()
    assert not (out / "merges.txt").exists()


def test_broken_link_is_an_error(model: Path, preset: Path, tmp_path: Path) -> None:
    (model / "tokenizer.model").symlink_to("gone")
    code, _, err = convert(model, preset, tmp_path / "out")
    assert code == 1
    assert "tokenizer.model: cannot be read (No such file or directory)" in err


def test_large_file_is_copied_in_pieces(model: Path, preset: Path, tmp_path: Path) -> None:
    with (model / "training.tar").open("wb") as file:
        file.truncate(256 << 20)
        file.write(b"end")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = converted(model, preset, tmp_path / "out")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10
    assert (out / "training.tar").stat().st_size == 256 << 20
    with (out / "training.tar").open("rb") as file:
        assert file.read(3) == b"end"


@pytest.mark.parametrize("kind", ["link", "hard-link", "pipe"])
@pytest.mark.parametrize("name", NAMES)
def test_no_link_in_the_work_folder_is_followed(
    model: Path, preset: Path, tmp_path: Path, name: str, kind: str
) -> None:
    out, victim = tmp_path / "out", tmp_path / "victim"
    victim.write_text("precious")
    path = out / WORK / name
    path.parent.mkdir(parents=True)
    if kind == "link":
        path.symlink_to(victim)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        os.link(victim, path)
    code, _, err = convert(model, preset, out, "--overwrite")
    assert code == 1
    assert f"{path}: is a link or no file (expected what a conversion wrote); remove it" in err
    assert victim.read_text() == "precious"
    path.unlink()
    assert convert(model, preset, out)[0] == 0


def test_work_folder_that_is_a_link_is_not_emptied(
    model: Path, preset: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.safetensors").write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / WORK).symlink_to(tmp_path / "mine")
    code, _, err = convert(model, preset, tmp_path / "out", "--overwrite")
    assert code == 1
    assert "is a link or no file" in err
    assert contents(tmp_path / "mine").keys() == {"a.safetensors"}


def test_link_in_the_output_is_replaced_and_not_followed(
    model: Path, preset: Path, tmp_path: Path
) -> None:
    out, victim = converted(model, preset, tmp_path / "out"), tmp_path / "victim"
    victim.write_text("precious")
    for name in ("model.safetensors", "tokenizer.json"):
        (out / name).unlink()
        (out / name).symlink_to(victim)
    assert convert(model, preset, out, "--overwrite", "--dtype", "float16")[0] == 0
    assert victim.read_text() == "precious"
    assert not any(path.is_symlink() for path in out.iterdir())


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_folder_in_the_place_of_a_file_is_an_error(
    model: Path, preset: Path, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "out"
    (out / WORK).mkdir(parents=True)
    (out / name / "sub").mkdir(parents=True)
    code, _, err = convert(model, preset, out)
    assert code == 1
    assert str(out) in err
    assert not passes_for_whole(out)
    assert (out / name / "sub").is_dir()


@pytest.mark.parametrize("how", ["link", "inside", "through-a-link", "circle"])
def test_output_in_the_model_by_another_path_is_refused(
    model: Path, preset: Path, tmp_path: Path, how: str
) -> None:
    before = contents(model)
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    paths = {"link": "link", "inside": "model/out", "through-a-link": "link/out",
             "circle": "circle/out"}  # fmt: skip
    code, _, err = convert(model, preset, tmp_path / paths[how])
    assert code == 1
    expected = "cannot be written (" if how == "circle" else "is, contains or is inside the source"
    assert expected in err
    assert contents(model) == before


RECORDS = ("", "{", "[]", "3", "null", '{"inputs": 3}', '{"inputs": {"a": 1}}', '{"file": "a"}',
           "\x00", "[" * 100_000, "[" * 900 + "]" * 900, '{"inputs": {}, "layers": 3}',
           '{"inputs": {}, "layers": [], "parts": {"../x": {"bytes": 1, "sha256": ""}}}',
           '{"inputs": {}, "layers": [], "parts": {}, "files": [".."]}',
           '{"file": "a", "sha256": "a", "provenance": [3]}')  # fmt: skip


@pytest.mark.parametrize("number", range(len(RECORDS)))
def test_damaged_journal_is_told_and_begun_anew_if_asked(
    model: Path, preset: Path, tmp_path: Path, number: int
) -> None:
    out, text = tmp_path / "out", RECORDS[number]
    (out / WORK).mkdir(parents=True)
    (out / WORK / "journal.jsonl").write_text(f"{text}\n")
    code, _, err = convert(model, preset, out)
    assert code == 1
    assert "journal.jsonl: is no" in err
    assert "add --overwrite to start over" in err
    assert convert(model, preset, out, "--overwrite")[0] == 0
    assert contents(out) == contents(converted(model, preset, tmp_path / "fresh"))


@pytest.mark.parametrize("number", range(len(RECORDS)))
def test_damaged_provenance_is_told(model: Path, preset: Path, tmp_path: Path, number: int) -> None:
    out = converted(model, preset, tmp_path / "out")
    (out / "mixedprec_provenance.json").write_text(RECORDS[number])
    before = contents(out)
    for more in ((), ("--overwrite",)):
        code, _, err = convert(model, preset, out, "--dtype", "float16", *more)
        assert code == 1
        assert "mixedprec_provenance.json: is no" in err or "other inputs" in err
        assert contents(out).items() >= before.items()


@pytest.mark.parametrize("text", ["", "3", "[3]", '[".."]', '["../victim"]', '["a/b"]', "{"])
def test_damaged_list_of_old_files_is_told(
    model: Path, preset: Path, tmp_path: Path, text: str
) -> None:
    (tmp_path / "victim").write_text("precious")
    out = converted(model, preset, tmp_path / "out")
    (out / WORK).mkdir()
    (out / WORK / "stale.json").write_text(text)
    code, _, err = convert(model, preset, out, "--overwrite")
    assert code == 1
    assert "stale.json: is no" in err
    assert (tmp_path / "victim").read_text() == "precious"


def test_copied_file_may_have_any_name(model: Path, preset: Path, tmp_path: Path) -> None:
    names = ("journal.jsonl", "stale.json", "stale.json.tmp", "files", "x" * 255)
    for name in names:
        (model / name).write_text(name)
    out = converted(model, preset, tmp_path / "out")
    assert all((out / name).read_text() == name for name in names)
    code, _, _ = convert(model, preset, out, "--overwrite", "--dtype", "float16")
    assert code == 0
    assert all((out / name).read_text() == name for name in names)
    listed = json.loads((out / "mixedprec_provenance.json").read_text())["files"]
    assert set(names) <= set(listed)
