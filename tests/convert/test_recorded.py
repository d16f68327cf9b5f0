"""A converted checkpoint is held against the digests that it carries wherever it is read again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.commands import convert, converted, run
from tests.convert.test_strange_files import RECORDS

PROVENANCE = "mixedprec_provenance.json"


@pytest.fixture
def out(model: Path, preset: Path, tmp_path: Path) -> Path:
    return converted(model, preset, tmp_path / "out", "--max-shard-size", "300KB")


def parts_of(out: Path) -> list[Path]:
    return sorted(out.glob("*.safetensors"))


def verify(out: Path, reference: Path) -> tuple[int, str, str]:
    return run("verify", "--model", out, "--device", "cpu", "--reference", reference)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 16
    path.write_bytes(data)


def test_whole_output_is_verified(out: Path, model: Path) -> None:
    assert verify(out, model)[0] == 0


@pytest.mark.parametrize("number", [0, 1, -1])
def test_flipped_bit_of_any_part_is_found_and_mended_as_the_message_says(
    out: Path, model: Path, preset: Path, number: int
) -> None:
    part = parts_of(out)[number]
    flip(part, -part.stat().st_size // 3)
    code, _, err = verify(out, model)
    assert code == 1
    assert f"{part}: has other bytes than {PROVENANCE} says; convert or copy it again" in err
    assert convert(model, preset, out, "--max-shard-size", "300KB", "--overwrite")[0] == 0
    assert verify(out, model)[0] == 0


def test_flipped_bit_of_the_reference_is_found(out: Path, model: Path, preset: Path) -> None:
    flip(parts_of(out)[0], -1000)
    flags = ("--model", model, "--preset", preset, "--device", "cpu")
    code, _, err = run("verify", *flags, "--reference", out)
    assert code == 1
    assert f"has other bytes than {PROVENANCE} says" in err


def rename_tensor(part: Path) -> None:
    """Another header of the same length."""
    data = part.read_bytes()
    assert b"_proj.weight" in data
    part.write_bytes(data.replace(b'"format":"pt"', b'"format":"tp"', 1))


def write_again(part: Path) -> None:
    tensors = load_file(part)
    save_file(tensors, part, {"by": "another"})


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "header": (rename_tensor, f"has another header than {PROVENANCE} says"),
    "size": (write_again, "bytes (expected "),
}


@pytest.mark.parametrize("verb", ["plan", "inspect", "convert"])
@pytest.mark.parametrize("kind", DAMAGES)
def test_size_and_header_of_every_part_are_looked_at_by_every_verb(
    out: Path, preset: Path, tmp_path: Path, verb: str, kind: str
) -> None:
    damage, message = DAMAGES[kind]
    damage(parts_of(out)[1])
    argv = {"plan": ("plan", "--model", out), "inspect": ("inspect", out),
            "convert": ("convert", "--model", out, "--out", tmp_path / "b")}[verb]  # fmt: skip
    code, _, err = run(*argv)
    assert code == 1
    assert str(parts_of(out)[1]) in err
    assert message in err
    # the other thing that the message says
    assert f"if the change was meant, remove {PROVENANCE}" in err
    (out / PROVENANCE).unlink()
    assert run("plan", "--model", out)[0] == 0


def test_part_that_is_missing_is_told(model: Path, preset: Path, tmp_path: Path) -> None:
    out = converted(model, preset, tmp_path / "out")
    (out / "model.safetensors").rename(out / "other.safetensors")
    code, _, err = run("plan", "--model", out)
    assert code == 1
    assert f"model.safetensors: is missing, which {PROVENANCE} lists" in err


def test_damaged_output_is_not_called_done(model: Path, preset: Path, out: Path) -> None:
    parts_of(out)[0].unlink()
    flags = (model, preset, out, "--max-shard-size", "300KB")
    code, _, err = convert(*flags)
    assert code == 1
    assert f"is missing, which {PROVENANCE} lists; add --overwrite to write everything again" in err
    assert convert(*flags, "--overwrite")[0] == 0
    assert run("plan", "--model", out)[0] == 0


@pytest.mark.parametrize("number", range(len(RECORDS)))
def test_damaged_record_is_told_and_can_be_removed(out: Path, number: int) -> None:
    (out / PROVENANCE).write_text(RECORDS[number])
    code, _, err = run("plan", "--model", out)
    if '"parts": {}' not in RECORDS[number]:
        assert code == 1
        assert f"{PROVENANCE}: is no" in err
        assert "remove it" in err
    (out / PROVENANCE).unlink()
    assert run("plan", "--model", out)[0] == 0


def test_outputs_of_the_other_format_are_held_against_their_record_too(
    model: Path, tmp_path: Path
) -> None:
    from tests.presets import write_preset

    preset = write_preset(tmp_path / "p", 'match: "*", method: fp8')
    out = converted(model, preset, tmp_path / "out", "--format", "compressed-tensors")
    flip(out / "model.safetensors", -100)
    bf16 = write_preset(tmp_path / "q", 'match: "*", method: bf16')
    flags = ("--model", out, "--preset", bf16, "--device", "cpu")
    code, _, err = run("verify", *flags, "--reference", model)
    assert code == 1
    assert "has other bytes" in err


def test_source_that_changes_while_it_is_verified_is_an_error(
    out: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mixedprec_plugin.verify.verifier import Verifier

    original = Verifier.compare_all

    def compare_all(verifier: Verifier) -> object:
        os.utime(model / "model-00001-of-00003.safetensors")
        return original(verifier)

    monkeypatch.setattr(Verifier, "compare_all", compare_all)
    code, _, err = verify(out, model)
    assert code == 1
    assert "model-00001-of-00003.safetensors: changed while it was read; run it again" in err


def test_config_of_an_output_may_be_edited(out: Path, model: Path) -> None:
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    assert verify(out, model)[0] == 0
