from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixedprec_plugin.checkpoint import ahead
from mixedprec_plugin.checkpoint.ahead import ReadAhead
from mixedprec_plugin.checkpoint.headers import StoredTensor, read_header
from mixedprec_plugin.checkpoint.reader import Reader
from mixedprec_plugin.errors import CheckpointError

MIB = 1 << 20


def _file(path: Path, sizes: list[int]) -> list[StoredTensor]:
    """Random float32 tensors of so many bytes; where they lie, in the file's order."""
    generator = torch.Generator().manual_seed(0)
    save_file(
        {f"t{i}": torch.randn(n // 4, generator=generator) for i, n in enumerate(sizes)}, path
    )
    return sorted(read_header(path).values(), key=lambda tensor: tensor.start)


def test_large_and_small_tensors_are_what_the_library_reads(tmp_path: Path) -> None:
    tensors = _file(tmp_path / "a.safetensors", [2 * MIB, 400, 8 * MIB, 0, 12, 4 * MIB])
    expected = load_file(tmp_path / "a.safetensors")
    with ReadAhead(tensors) as reader:
        read = {tensor.name: reader.read_finite(tensor) for tensor in tensors}
    assert all(torch.equal(read[name], expected[name]) for name in expected)
    # they outlive the reader
    assert read.keys() == expected.keys()


def test_a_tensor_out_of_turn_is_read_too(tmp_path: Path) -> None:
    tensors = _file(tmp_path / "a.safetensors", [2 * MIB, 400, 8 * MIB])
    expected = load_file(tmp_path / "a.safetensors")
    with ReadAhead(tensors[:2]) as reader:
        for tensor in (tensors[2], tensors[1], tensors[0]):
            assert torch.equal(reader.read_finite(tensor), expected[tensor.name])


def test_tiny_tensors_are_read_in_any_order_and_not_before_they_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "tiny.safetensors"
    tensors = _file(path, [400 + 4 * (i % 7) for i in range(3000)])[::-1]
    expected = {name: tensor.clone() for name, tensor in load_file(path).items()}
    with ReadAhead(tensors) as reader:
        for index, tensor in enumerate(tensors):
            assert torch.equal(reader.read_finite(tensor), expected[tensor.name])
            if index == 1000:
                reader._threads.submit(int).result()
                assert _mapped_bytes(path.name) == 0


def test_tiny_tensor_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"good": torch.ones(8), "spoilt": torch.tensor([1.0, float("nan")])}, path)
    tensors = read_header(path)
    with ReadAhead(tensors.values()) as reader:
        reader.read_finite(tensors["good"])
        with pytest.raises(CheckpointError, match=r"spoilt: 1 of 2 weights in .* are NaN"):
            reader.read_finite(tensors["spoilt"])


def test_no_more_than_the_budget_waits_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "BUDGET_BYTES", 5 * MIB)
    monkeypatch.setattr(ahead, "_BUDGET_SHARE", 1)
    tensors = _file(tmp_path / "a.safetensors", [2 * MIB] * 10)
    mapped = []
    with ReadAhead(tensors) as reader:
        for tensor in tensors:
            reader.read_finite(tensor)
            reader._threads.submit(int).result()
            mapped.append(_mapped_bytes("a.safetensors"))
    assert max(mapped) <= 5 * MIB + 3 * mmap.PAGESIZE
    assert max(mapped) > 2 * MIB
    assert _mapped_bytes("a.safetensors") == 0


def _mapped_bytes(name: str) -> int:
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(name):
            start, end = (int(x, 16) for x in line.split()[0].split("-"))
            total += end - start
    return total


def test_writing_to_a_tensor_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    (tensor,) = _file(tmp_path / "a.safetensors", [2 * MIB])
    before = tensor.path.read_bytes()
    with Reader() as reader:
        reader.read(tensor).zero_()
        assert bool(reader.read(tensor).any())
    assert tensor.path.read_bytes() == before


def test_tensors_that_start_anywhere_are_read(tmp_path: Path) -> None:
    """A header of a length that is no multiple of 8, as old writers leave."""
    tensors = _file(tmp_path / "a.safetensors", [2 * MIB, 2 * MIB])
    data = tensors[0].path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    odd = tmp_path / "odd.safetensors"
    odd.write_bytes((length + 3).to_bytes(8, "little") + data[8 : 8 + length] + b"   ")
    with odd.open("ab") as file:
        file.write(data[8 + length :])
    expected = load_file(tmp_path / "a.safetensors")
    with Reader() as reader:
        for tensor in read_header(odd).values():
            assert tensor.start % 4
            assert torch.equal(reader.read_finite(tensor), expected[tensor.name])


def test_a_file_cut_short_before_it_is_mapped_raises(tmp_path: Path) -> None:
    tensors = _file(tmp_path / "a.safetensors", [2 * MIB, 2 * MIB])
    os.truncate(tensors[0].path, tensors[1].start + MIB)
    with ReadAhead(tensors) as reader:
        reader.read_finite(tensors[0])
        with pytest.raises(CheckpointError, match="ends inside 't1'"):
            reader.read_finite(tensors[1])


def test_a_file_that_went_away_raises(tmp_path: Path) -> None:
    tensors = _file(tmp_path / "a.safetensors", [2 * MIB])
    tensors[0].path.unlink()
    with Reader() as reader, pytest.raises(CheckpointError, match="cannot be read \\(No such file"):
        reader.read(tensors[0])


_NOT_FINITE = [
    (dtype, bits)
    for dtype, exponent, sign in (
        (torch.bfloat16, 0x7F80, 0x8000),
        (torch.float16, 0x7C00, 0x8000),
        (torch.float32, 0x7F800000, 0x80000000),
        (torch.float8_e5m2, 0x7C, 0x80),
    )
    for bits in (exponent, exponent | sign, exponent + 1, (exponent + 1) | sign)
] + [(torch.float8_e4m3fn, 0x7F), (torch.float8_e4m3fn, 0xFF)]


@pytest.mark.parametrize(("dtype", "bits"), _NOT_FINITE)
def test_every_number_that_is_not_finite_is_found(
    tmp_path: Path, dtype: torch.dtype, bits: int
) -> None:
    size = dtype.itemsize
    raw = torch.zeros(3 * MIB // size, size, dtype=torch.uint8)
    # the greatest finite numbers of both signs are none
    last = (
        (bits | 1) - 1
        if dtype == torch.float8_e4m3fn
        else {2: 0x7B80, 4: 0x7F7FFFFF, 1: 0x7B}[size]
    )
    raw[5] = torch.tensor(list(last.to_bytes(size, "little")), dtype=torch.uint8)
    path = tmp_path / "a.safetensors"
    save_file({"t": raw.view(dtype).reshape(-1)}, path)
    with Reader() as reader:
        reader.read_finite(read_header(path)["t"])
    raw[-7] = torch.tensor(list(bits.to_bytes(size, "little")), dtype=torch.uint8)
    save_file({"t": raw.view(dtype).reshape(-1)}, path)
    with (
        Reader() as reader,
        pytest.raises(
            CheckpointError, match=r"1 of [0-9,]+ weights in a.safetensors are NaN or inf"
        ),
    ):
        reader.read_finite(read_header(path)["t"])


def test_a_lean_reader_holds_nothing_that_was_not_asked_for(tmp_path: Path) -> None:
    tensors = _file(tmp_path / "a.safetensors", [2 * MIB] * 4)
    with ReadAhead(tensors, is_lean=True) as reader:
        for tensor in tensors:
            value = reader.read_finite(tensor)
            assert _mapped_bytes("a.safetensors") <= 2 * MIB + 2 * mmap.PAGESIZE
            del value
