from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixedprec_plugin.checkpoint.ahead import ReadAhead
from mixedprec_plugin.checkpoint.direct import DirectReads
from mixedprec_plugin.checkpoint.headers import StoredTensor, read_header
from mixedprec_plugin.errors import CheckpointError

MIB = 1 << 20
# 12 MiB, three pieces
N, K = 3072, 1024
NAN = float("nan")


def _weights() -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(0))


class File:
    """A file that is read directly, and what reads it."""

    def __init__(self, path: Path, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, path)
        # not mappings of the file
        self.expected = {name: tensor.clone() for name, tensor in load_file(path).items()}
        self.stored: dict[str, StoredTensor] = read_header(path)
        self.direct = DirectReads(num_threads=2)
        self.reader = ReadAhead(self.stored.values(), direct=self.direct)

    def take(self, name: str) -> torch.Tensor:
        return self.reader.read_to_place(self.stored[name])


@pytest.fixture
def file(tmp_path: Path) -> Iterator[File]:
    made = File(tmp_path / "a.safetensors", {"w": _weights(), "small": torch.ones(3)})
    with made.reader:
        yield made


def _file_pages(path: Path) -> int:
    """How many pages of a file's mappings are in this process's memory."""
    total, is_ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and ":" not in line.split()[0]:
            is_ours = line.endswith(str(path))
        elif is_ours and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    return total // mmap.PAGESIZE


def test_what_is_copied_is_read_into_the_target_and_nowhere_else(file: File) -> None:
    target = torch.empty(N, K)
    assert file.direct.copy(target, file.take("w"))
    file.direct.settle()
    file.direct.wait()
    assert torch.equal(target, file.expected["w"])
    assert _file_pages(file.stored["w"].path) == 0


def test_small_tensor_is_an_ordinary_one(file: File) -> None:
    target, source = torch.empty(3), file.take("small")
    assert not file.direct.copy(target, source)
    assert torch.equal(source, file.expected["small"])


@pytest.mark.parametrize("start", [0, 1024, 2048])
def test_rows_of_a_rank_are_read_into_a_part_of_a_fused_target(file: File, start: int) -> None:
    target = torch.zeros(2048, K)
    assert file.direct.copy(target[1024:], file.take("w")[start : start + 1024])
    file.direct.settle()
    file.direct.wait()
    assert torch.equal(target[1024:], file.expected["w"][start : start + 1024])
    assert not target[:1024].any()
    # the page that it shares with its neighbour
    assert _file_pages(file.stored["w"].path) <= 1


def test_columns_of_a_rank_are_copied_as_ever(file: File) -> None:
    target, source = torch.empty(N, 512), file.take("w")
    assert not file.direct.copy(target, source[:, 512:])
    target.copy_(source[:, 512:])
    file.direct.settle()
    assert torch.equal(target, file.expected["w"][:, 512:])
    assert _file_pages(file.stored["w"].path) <= 1


def test_what_must_be_cast_is_copied_as_ever(file: File) -> None:
    assert not file.direct.copy(torch.empty(N, K, dtype=torch.bfloat16), file.take("w"))


@pytest.mark.parametrize("spoilt", [0, 1500 * K, N * K - 1])
@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("num_rows", [N, 1024, 0])
def test_number_that_is_not_finite_is_found_wherever_it_goes(
    tmp_path: Path, spoilt: int, value: float, num_rows: int
) -> None:
    """Copied whole, in part, or not at all."""
    weights = _weights()
    weights.view(-1)[spoilt] = value
    file = File(tmp_path / "a.safetensors", {"w": weights})

    def load() -> None:
        source = file.take("w")
        if num_rows:
            file.direct.copy(torch.empty(num_rows, K), source[:num_rows])
        file.direct.settle()
        file.direct.wait()

    with (
        file.reader,
        pytest.raises(CheckpointError, match=r"^w: 1 of 3,145,728 weights in a\.safetensors are N"),
    ):
        load()


def test_later_copy_to_the_same_place_wins(tmp_path: Path) -> None:
    file = File(tmp_path / "a.safetensors", {"first": _weights(), "second": _weights() + 1})
    target = torch.empty(N, K)
    with file.reader:
        for name in ("first", "second"):
            assert file.direct.copy(target, file.take(name))
        file.direct.wait()
    assert torch.equal(target, file.expected["second"])


def test_file_that_is_cut_short_while_it_is_read_raises(file: File) -> None:
    source = file.take("w")
    os.truncate(file.stored["w"].path, file.stored["w"].start + 5 * MIB)
    file.direct.copy(torch.empty(N, K), source)
    with pytest.raises(CheckpointError, match="ends inside 'w'"):
        file.direct.wait()


def test_what_was_begun_is_dropped_when_the_reader_is_closed(file: File) -> None:
    file.direct.copy(torch.empty(N, K), file.take("w"))
    file.reader.close()
    assert not file.direct.is_writing
    assert _file_pages(file.stored["w"].path) == 0


def test_tensors_without_numbers_that_could_be_wrong_are_read_too(tmp_path: Path) -> None:
    words = torch.randint(-(2**31), 2**31 - 1, (N, K), dtype=torch.int32)
    file = File(tmp_path / "a.safetensors", {"qweight": words})
    target = torch.empty(N, K, dtype=torch.int32)
    with file.reader:
        assert file.direct.copy(target, file.take("qweight"))
        file.direct.settle()
        file.direct.wait()
    assert torch.equal(target, words)
