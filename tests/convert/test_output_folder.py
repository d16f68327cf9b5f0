"""The folder that `mixedprec convert` writes to: finished, foreign, full, or in use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.commands import convert
from tests.convert.folders import contents
from tests.presets import write_preset


def test_second_run_finds_nothing_to_do(model: Path, preset: Path, tmp_path: Path) -> None:
    convert(model, preset, tmp_path / "out")
    before = contents(tmp_path / "out")
    code, text, _ = convert(model, preset, tmp_path / "out")
    assert (code, contents(tmp_path / "out")) == (0, before)
    assert "1 of them from before" in text


def test_conversion_of_other_inputs_is_replaced_only_if_asked(
    model: Path, preset: Path, tmp_path: Path
) -> None:
    convert(model, preset, tmp_path / "out", "--max-shard-size", "300KB")
    before = contents(tmp_path / "out")
    other = write_preset(tmp_path / "other", 'match: "*", method: fp8')
    code, _, err = convert(model, other, tmp_path / "out")
    assert code == 1
    assert (
        "holds a conversion of other inputs (the preset, how the files are split, the plan" in err
    )
    assert contents(tmp_path / "out") == before
    assert convert(model, other, tmp_path / "out", "--overwrite")[0] == 0
    assert convert(model, other, tmp_path / "fresh")[0] == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_changed_weights_of_a_source_are_other_inputs(
    model: Path, preset: Path, tmp_path: Path
) -> None:
    convert(model, preset, tmp_path / "out")
    path = model / "model-00001-of-00003.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    code, _, err = convert(model, preset, tmp_path / "out")
    assert code == 1
    assert "(the sources' files changed)" in err


def test_folder_of_something_else_is_never_touched(
    model: Path, preset: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    code, _, err = convert(model, preset, tmp_path / "out", "--overwrite")
    assert code == 1
    assert "out: is not empty, and no conversion wrote it; name a new folder" in err
    assert contents(tmp_path / "out").keys() == {"thesis.tex"}


@pytest.mark.parametrize("where", ["model", "model/sub", "."])
def test_output_beside_the_source_only(
    model: Path, preset: Path, tmp_path: Path, where: str
) -> None:
    before = contents(model)
    code, _, err = convert(model, preset, tmp_path / where)
    assert code == 1
    assert "is, contains or is inside the source 'model'" in err
    assert contents(model) == before


def test_folder_that_cannot_be_made_is_an_error(model: Path, preset: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = convert(model, preset, tmp_path / "file" / "out")
    assert code == 1
    assert "cannot be written (Not a directory); name another folder" in err


def test_folder_that_is_read_only_is_an_error(model: Path, preset: Path) -> None:
    code, _, err = convert(model, preset, Path("/proc/mixedprec/out"))
    assert code == 1
    assert "cannot be written (" in err


def test_full_disk_is_told_before_the_work(tmp_path: Path) -> None:
    from mixedprec_plugin.convert.folder import require_space
    from mixedprec_plugin.errors import ConvertError

    with pytest.raises(ConvertError, match=r"bytes free .expected 1,152,921,504,606,846,976."):
        require_space(tmp_path, 1 << 60)


def test_second_process_waits_its_turn(model: Path, preset: Path, tmp_path: Path) -> None:
    from mixedprec_plugin.convert.journal import Journal

    (tmp_path / "out" / ".mixedprec-partial").mkdir(parents=True)
    journal = Journal(tmp_path / "out" / ".mixedprec-partial")
    code, _, err = convert(model, preset, tmp_path / "out")
    journal.close()
    assert code == 1
    assert "another process is converting into this folder" in err


@pytest.mark.parametrize("size", ["5XB", "0MB", "GB", "-1GB", "9" * 400 + "GB"])
def test_size_that_is_none_is_a_usage_error(
    model: Path, preset: Path, tmp_path: Path, size: str
) -> None:
    code, _, err = convert(model, preset, tmp_path / "out", f"--max-shard-size={size}")
    assert code == 2
    assert f"--max-shard-size: {size!r} is not a size (expected one such as 5GB or 500MB)" in err


def test_size_without_a_unit_is_asked_for_one(model: Path, preset: Path, tmp_path: Path) -> None:
    code, _, err = convert(model, preset, tmp_path / "out", "--max-shard-size", "5")
    assert code == 2
    assert err == "mixedprec: error: --max-shard-size: '5' has no unit (expected one such as 5GB)\n"
