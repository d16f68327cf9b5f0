from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mixedprec_plugin.checkpoint.headers import read_header
from mixedprec_plugin.checkpoint.reader import Reader
from mixedprec_plugin.errors import CheckpointError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    tensors = {
        "a.weight": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4),
        "b.scale": torch.tensor(0.5),
        "c.qweight": torch.arange(-4, 4, dtype=torch.int32).reshape(2, 4),
        "d.weight": torch.tensor([[0.5, -448.0]]).to(torch.float8_e4m3fn),
        "e.flags": torch.tensor([True, False]),
        "f.empty": torch.empty(0, 4),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def test_header_agrees_with_the_safetensors_library(file: Path) -> None:
    header = read_header(file)
    with safe_open(file, framework="pt") as library:
        assert set(header) == set(library.keys())
        for name, tensor in header.items():
            piece = library.get_slice(name)
            assert (tensor.dtype, list(tensor.shape)) == (piece.get_dtype(), piece.get_shape())


def test_reader_agrees_with_the_safetensors_library(file: Path) -> None:
    with safe_open(file, framework="pt") as library, Reader() as reader:
        for name, tensor in read_header(file).items():
            value, expected = reader.read(tensor), library.get_tensor(name)
            assert value.dtype == expected.dtype
            assert value.shape == expected.shape
            assert (
                value.view(torch.uint8).equal(expected.view(torch.uint8))
                if value.dim()
                else (value == expected)
            )


def test_truncated_file_raises(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: it is truncated: .* download"):
        read_header(file)


def test_trailing_bytes_raise(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"junk")
    with pytest.raises(CheckpointError, match="longer than its header says"):
        read_header(file)


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 64, b"\x04" + b"\0" * 7 + b"nope"])
def test_file_that_is_no_safetensors_raises(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="download the file again"):
        read_header(path)


def test_missing_file_raises(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be read .No such file"):
        read_header(tmp_path / "model.safetensors")


def test_offsets_that_do_not_fit_the_shape_raise(tmp_path: Path) -> None:
    header = {"a.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 12]}}
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(12))
    with pytest.raises(CheckpointError, match=r"'a\.weight' spans 12 bytes .expected 16 for F32"):
        read_header(path)


def test_malformed_entry_raises(tmp_path: Path) -> None:
    text = json.dumps({"a.weight": {"dtype": "F32"}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(CheckpointError, match=r"entry for 'a\.weight' is malformed"):
        read_header(path)


def test_file_that_shrinks_while_it_is_read_raises(file: Path) -> None:
    tensors = read_header(file)
    last = max(tensors.values(), key=lambda tensor: tensor.start + tensor.num_bytes)
    file.write_bytes(file.read_bytes()[: last.start + last.num_bytes - 1])
    with pytest.raises(CheckpointError, match="ends inside"), Reader() as reader:
        reader.read(last)
