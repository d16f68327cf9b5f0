from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
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


TENSOR = '{"dtype":"U8","shape":[2],"data_offsets":[0,2]}'
ODD = [
    f'{{"a":{TENSOR}}}', f' {{"a":{TENSOR}}}  ', f'{{"a":{TENSOR},"a":{TENSOR}}}',
    '{"a":{"dtype":"U8","dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
    '{"a":{"dtype":"U8","\\u0064type":"U8","shape":[2],"data_offsets":[0,2]}}',
    '{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2],"more":1}}',
    '{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2.0]}}',
    '{"a":{"dtype":"U8","shape":[2],"data_offsets":[false,2]}}',
    '{"a":{"dtype":"U8","shape":[true,2],"data_offsets":[0,2]}}',
    '{"a":{"dtype":"U8","shape":[-2,-1],"data_offsets":[0,2]}}',
    '{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2,2]}}',
    f'{{"__metadata__":{{}},"__metadata__":{{}},"a":{TENSOR}}}',
    f'{{"__metadata__":{{"x":"1","x":"2"}},"a":{TENSOR}}}',
    f'{{"__metadata__":{{"x":1}},"a":{TENSOR}}}', f'{{"__metadata__":null,"a":{TENSOR}}}',
    f'{{"\\ud800":{TENSOR}}}', "{}", "[]",
]  # fmt: skip


@pytest.mark.parametrize("text", ODD)
def test_odd_header_is_what_the_safetensors_library_takes_it_for(tmp_path: Path, text: str) -> None:
    path, raw = tmp_path / "model.safetensors", text.encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(0 if text == "{}" else 2))
    try:
        with safe_open(path, framework="pt") as library:
            expected = set(library.keys())
    except SafetensorError:
        with pytest.raises(CheckpointError):
            read_header(path)
        return
    assert set(read_header(path)) == expected


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


def entry(dtype: str = "F32", shape: Any = (2, 2), data_offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": data_offsets}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry(data_offsets=(0, 12))}, r"\(invalid shape, data type, or offset for tensor"),
        ({"a": {"dtype": "F32"}}, r"\(invalid JSON in header: missing field `shape`"),
        ({"a": entry(), "b": entry(data_offsets=(8, 24))}, "invalid offset for tensor `b`"),
        ({"a": entry(), "b": entry(data_offsets=(24, 40))}, "invalid offset for tensor `b`"),
        ({"a": entry(shape=(-2, -2))}, "integer `-2`, expected usize"),
        ({"a": entry("F99")}, "unknown variant `F99`, expected one of `BOOL`"),
        ({"a": entry(), "__metadata__": {"format": 1}}, "integer `1`, expected a string"),
        ('{"a": %s, "a": %s}', "invalid offset for tensor `a`"),
        ('{"a": ' + "[" * 100_000, "recursion limit exceeded"),
    ],
)
def test_what_the_library_refuses_is_an_error_in_its_words(
    tmp_path: Path, header: Any, message: str
) -> None:
    if isinstance(header, str) and "%" in header:
        header %= json.dumps(entry()), json.dumps(entry(data_offsets=(16, 32)))
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(40))
    with pytest.raises(CheckpointError, match=r"safetensors refuses its header .*; download"):
        read_header(path)
    with pytest.raises(CheckpointError, match=message):
        read_header(path)


@pytest.mark.parametrize(("dtype", "num_bytes"), [("F4", 2), ("F8_E8M0", 4), ("C64", 32)])
def test_dtype_that_is_not_read_is_named(tmp_path: Path, dtype: str, num_bytes: int) -> None:
    text = json.dumps({"a": entry(dtype, data_offsets=(0, num_bytes))}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(num_bytes))
    tensor = read_header(path)["a"]
    assert (tensor.dtype, tensor.num_bytes) == (dtype, num_bytes)
    with (
        pytest.raises(CheckpointError, match=rf"'a' is {dtype} \(expected BOOL, U8"),
        Reader() as reader,
    ):
        reader.read(tensor)
