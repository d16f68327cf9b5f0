"""Reading tensors: what comes of it, how much memory it takes, and what becomes of the files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixedprec_plugin.checkpoint.headers import StoredTensor, read_header
from mixedprec_plugin.checkpoint.reader import Reader, Reading
from mixedprec_plugin.errors import CheckpointError

MIB = 1 << 20
BOTH = pytest.mark.parametrize("how", [Reading(), Reading(may_map=False)], ids=["mapped", "read"])


def write(path: Path, sizes: list[int]) -> list[StoredTensor]:
    """Random float32 tensors of so many bytes; where they lie, in the file's order."""
    generator = torch.Generator().manual_seed(0)
    made = {f"t{i}": torch.randn(n // 4, generator=generator) for i, n in enumerate(sizes)}
    save_file(made, path)
    return list(read_header(path).values())


def resident_bytes(path: Path) -> int:
    """How much of a file's mappings is in this process's memory."""
    total, is_ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and ":" not in line.split()[0]:
            is_ours = line.endswith(str(path))
        elif is_ours and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    return total


@BOTH
def test_any_order_and_dtype_is_what_the_library_reads(tmp_path: Path, how: Reading) -> None:
    path = tmp_path / "a.safetensors"
    made = {
        "a": torch.randn(1 << 19),
        "b": torch.tensor(0.5),
        "c": torch.arange(-4, 4, dtype=torch.int32).reshape(2, 4),
        "d": torch.tensor([[0.5, -448.0]]).to(torch.float8_e4m3fn),
        "e": torch.tensor([True, False]),
        "f": torch.empty(0, 4),
        "g": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4),
    }
    save_file(made, path)
    with Reader(how) as reader:
        values = {name: reader.read(tensor) for name, tensor in read_header(path).items()}
    for name, expected in load_file(path).items():
        value = values[name]
        assert (value.dtype, value.shape) == (expected.dtype, expected.shape)
        assert torch.equal(
            value.reshape(-1).view(torch.uint8), made[name].view(-1).view(torch.uint8)
        )
    # what is followed by its storage must have one
    assert len({int(value.untyped_storage()._cdata) for value in values.values()}) == len(values)


@BOTH
def test_file_is_mapped_only_if_it_may_be(tmp_path: Path, how: Reading) -> None:
    (stored,) = write(tmp_path / "a.safetensors", [2 * MIB])
    with Reader(how) as reader:
        value = reader.read_finite(stored)
        assert (str(stored.path) in Path("/proc/self/maps").read_text()) == how.may_map
        assert value.shape == stored.shape


def test_no_more_than_some_mib_of_a_file_stay_in_memory(tmp_path: Path) -> None:
    tensors = write(tmp_path / "a.safetensors", [8 * MIB] * 12)
    held = []
    with Reader() as reader:
        for tensor in tensors:
            reader.read_finite(tensor)
            held.append(resident_bytes(tensor.path))
    assert 8 * MIB <= max(held) <= 33 * MIB
    assert resident_bytes(tensors[0].path) == 0


@BOTH
def test_writing_to_a_tensor_leaves_the_file_as_it_is(tmp_path: Path, how: Reading) -> None:
    large, small = write(tmp_path / "a.safetensors", [2 * MIB, 400])
    before = large.path.read_bytes()
    with Reader(how) as reader:
        reader.read(large).zero_()
        reader.read(small).zero_()
        assert bool(reader.read(small).any())
    with Reader(how) as reader:
        assert bool(reader.read(large).any())
    assert large.path.read_bytes() == before


@BOTH
def test_tensors_that_start_anywhere_are_read(tmp_path: Path, how: Reading) -> None:
    """A header of a length that is no multiple of 8, as old writers leave."""
    tensors = write(tmp_path / "a.safetensors", [2 * MIB, 400])
    data = tensors[0].path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    odd = tmp_path / "odd.safetensors"
    odd.write_bytes(
        (length + 3).to_bytes(8, "little") + data[8 : 8 + length] + b"   " + data[8 + length :]
    )
    expected = load_file(tmp_path / "a.safetensors")
    with Reader(how) as reader:
        for tensor in read_header(odd).values():
            assert torch.equal(reader.read_finite(tensor), expected[tensor.name])


@BOTH
def test_file_that_was_cut_short_is_an_error(tmp_path: Path, how: Reading) -> None:
    first, last = write(tmp_path / "a.safetensors", [2 * MIB, 2 * MIB])
    with Reader(how) as reader:
        reader.read_finite(first)
        os.truncate(first.path, first.path.stat().st_size - MIB)
        with pytest.raises(
            CheckpointError, match=r"(truncated|ends inside 't1').*; it changed while"
        ):
            reader.read_finite(last)


@BOTH
def test_file_that_went_away_is_an_error(tmp_path: Path, how: Reading) -> None:
    (tensor,) = write(tmp_path / "a.safetensors", [2 * MIB])
    tensor.path.unlink()
    with Reader(how) as reader, pytest.raises(CheckpointError, match=r"read \(No such file"):
        reader.read(tensor)


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({"t1": torch.ones(512, 1024)}, "File does not contain tensor t0"),
        ({"t0": torch.ones(1024, 1024).half()}, "'t0' is another tensor now"),
        ({"t0": torch.ones(1024, 512)}, "'t0' is another tensor now"),
    ],
)
def test_file_of_other_tensors_is_an_error(
    tmp_path: Path, now: dict[str, torch.Tensor], message: str
) -> None:
    (tensor,) = write(tmp_path / "a.safetensors", [2 * MIB])
    save_file(now, tensor.path)
    with Reader() as reader, pytest.raises(CheckpointError, match=f"{message}; it changed while"):
        reader.read(tensor)


def test_disk_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    stored = StoredTensor("t", "U8", (8,), tmp_path, 0, 8)
    message = r"'t' cannot be read \(Is a directory\); check the disk"
    with Reader(Reading(may_map=False)) as reader, pytest.raises(CheckpointError, match=message):
        reader.read(stored)


@pytest.mark.parametrize("drops", [True, False])
def test_pages_are_dropped_if_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drops: bool
) -> None:
    (stored,) = write(tmp_path / "a.safetensors", [2 * MIB])
    advice: list[tuple[int, int, int]] = []
    real = os.posix_fadvise

    def advise(descriptor: int, *rest: int) -> None:
        advice.append((rest[0], rest[1], rest[2]))
        real(descriptor, *rest)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    with Reader(Reading(drops_cache=drops)) as reader:
        reader.read(stored)
        assert advice == []
    assert advice == [(0, 0, os.POSIX_FADV_DONTNEED)] * drops


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


@pytest.mark.parametrize("position", [0, -1, -7])
@pytest.mark.parametrize(("dtype", "bits"), _NOT_FINITE)
def test_every_number_that_is_not_finite_is_found(
    tmp_path: Path, dtype: torch.dtype, bits: int, position: int
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
    raw[position] = torch.tensor(list(bits.to_bytes(size, "little")), dtype=torch.uint8)
    save_file({"t": raw.view(dtype).reshape(-1)}, path)
    message = r"^t: 1 of [0-9,]+ weights in a.safetensors are NaN or inf.*; the checkpoint is dam"
    with Reader() as reader, pytest.raises(CheckpointError, match=message):
        reader.read_finite(read_header(path)["t"])
