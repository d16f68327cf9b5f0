"""What is taken for a checkpoint and is none, is told by what it is."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.errors import CheckpointError
from tests.checkpoints import write_llama

# of the specification, https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
POINTER = """version https://git-lfs.github.com/spec/v1
oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393
size 12345
"""


def refusal(path: Path) -> str:
    """Why a path is not opened, the folder of the test left out."""
    with pytest.raises(CheckpointError) as caught:
        open_source(path)
    (problem,) = caught.value.problems
    return str(problem)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "model")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_of_a_checkpoint_names_its_folder(model: Path, name: str) -> None:
    assert refusal(model / name) == f"{model / name}: is a file; give its folder, {model}"


@pytest.mark.parametrize("within", [True, False])
def test_gguf_is_named(tmp_path: Path, within: bool) -> None:
    file = tmp_path / "some.Q4_K_M.gguf"
    file.write_bytes(b"GGUF\x03\0\0\0")
    said = refusal(tmp_path if within else file)
    assert said == (
        f"{file}: is a GGUF file, which is not read (expected a folder of safetensors); "
        "take the model's safetensors checkpoint, which it was made from"
    )


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_pointers_of_git_lfs_are_named(model: Path, name: str) -> None:
    (model / name).write_text(POINTER)
    assert refusal(model) == (
        f"{model / name}: is a Git LFS pointer, not the file itself; fetch it with "
        f"'git -C {model} lfs pull', or download the file"
    )


def test_an_empty_folder_is_said_to_be_empty(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"{tmp_path}: is an empty folder; download the checkpoint into it"


def test_a_folder_around_a_checkpoint_names_it(model: Path) -> None:
    assert refusal(model.parent) == f"{model.parent}: has no config.json; {model} has one"


def test_weights_without_a_config_ask_for_it(model: Path) -> None:
    (model / "config.json").unlink()
    said = refusal(model)
    assert said == f"{model / 'config.json'}: is not there; download it beside the weights"


def test_a_folder_of_something_else_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    assert "is not a checkpoint: it has neither config.json nor weights" in refusal(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_weights_ask_for_permissions(model: Path) -> None:
    (model / "model.safetensors").chmod(0)
    said = refusal(model)
    assert said.endswith("cannot be read (Permission denied); check its permissions")


def test_a_missing_part_is_to_be_downloaded(model: Path) -> None:
    shutil.move(model / "model.safetensors", model / "gone")
    (model / "model.safetensors").symlink_to(model / "nowhere")
    assert refusal(model).endswith("cannot be read (No such file or directory); download it")
