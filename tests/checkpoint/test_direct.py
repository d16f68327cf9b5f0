from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mixedprec_plugin.checkpoint import direct
from mixedprec_plugin.checkpoint.direct import DirectReads
from mixedprec_plugin.checkpoint.fresh_pages import FreshPages
from mixedprec_plugin.errors import CheckpointError
from tests.direct import DirectFile, K, N, random_weights

MIB = 1 << 20
NAN = float("nan")


@pytest.fixture(params=["fresh", "plain"], autouse=True)
def pages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test, with and without pages that are copies from the start."""
    if request.param == "plain":
        monkeypatch.setattr(FreshPages, "open", lambda: None)
        return
    opened = FreshPages.open()
    if opened is None:
        pytest.skip("this system has no userfaultfd for us, or brings memory in in huge pages")
    opened.close()
    monkeypatch.setattr(direct, "_MIN_FILLED_BYTES", 1)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[DirectFile]:
    made = DirectFile(tmp_path / "a.safetensors", {"w": random_weights(), "small": torch.ones(3)})
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


def test_what_is_copied_is_read_into_the_target_and_nowhere_else(file: DirectFile) -> None:
    target = torch.empty(N, K)
    assert file.direct.copy(target, file.take("w"))
    file.direct.settle()
    file.direct.wait()
    assert torch.equal(target, file.expected["w"])
    assert _file_pages(file.path) == 0


def test_small_tensor_is_an_ordinary_one(file: DirectFile) -> None:
    target, source = torch.empty(3), file.take("small")
    assert not file.direct.copy(target, source)
    assert torch.equal(source, file.expected["small"])


def test_target_that_was_written_to_before_is_overwritten(file: DirectFile) -> None:
    target = torch.full((N, K), 7.0)
    assert file.direct.copy(target, file.take("w"))
    file.direct.settle()
    file.direct.wait()
    assert torch.equal(target, file.expected["w"])


def test_many_pieces_are_read_by_whoever_is_there(tmp_path: Path) -> None:
    """More of them than are queued at once, by one thread and by many."""
    tensors = {f"w{i}": random_weights() + i for i in range(6)}
    file = DirectFile(tmp_path / "a.safetensors", tensors)
    for num_threads in (1, 2, 5):
        targets = {name: torch.empty(N, K) for name in tensors}
        with DirectReads(num_threads=num_threads) as reads:
            for name, target in targets.items():
                assert reads.copy(target, reads.offer(file.stored[name], file.reader))
        for name, target in targets.items():
            assert torch.equal(target, file.expected[name])
    file.reader.close()


def test_change_of_a_neighbour_is_not_lost(tmp_path: Path) -> None:
    tensors = {f"w{i}": random_weights()[:512] + i for i in range(3)}
    file = DirectFile(tmp_path / "a.safetensors", tensors)
    with file.reader:
        changed = file.take("w1")
        file.direct.withdraw(changed)
        changed.add_(1)
        for name in ("w0", "w2"):
            assert file.direct.copy(torch.empty(512, K), file.take(name))
        file.direct.settle()
        file.direct.wait()
        assert torch.equal(changed, file.expected["w1"] + 1)


@pytest.mark.parametrize("start", [0, 1024, 2048])
def test_rows_of_a_rank_are_read_into_a_part_of_a_fused_target(
    file: DirectFile, start: int
) -> None:
    target = torch.zeros(2048, K)
    assert file.direct.copy(target[1024:], file.take("w")[start : start + 1024])
    file.direct.settle()
    file.direct.wait()
    assert torch.equal(target[1024:], file.expected["w"][start : start + 1024])
    assert not target[:1024].any()
    # the page that it shares with its neighbour
    assert _file_pages(file.path) <= 1


def test_columns_of_a_rank_are_copied_as_ever(file: DirectFile) -> None:
    target, source = torch.empty(N, 512), file.take("w")
    assert not file.direct.copy(target, source[:, 512:])
    target.copy_(source[:, 512:])
    file.direct.settle()
    assert torch.equal(target, file.expected["w"][:, 512:])
    assert _file_pages(file.path) <= 1


def test_what_must_be_cast_is_copied_as_ever(file: DirectFile) -> None:
    assert not file.direct.copy(torch.empty(N, K, dtype=torch.bfloat16), file.take("w"))


@pytest.mark.parametrize("spoilt", [0, 1500 * K, N * K - 1])
@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("rows", [(0, N), (0, 1024), (2048, N), (0, 0)])
def test_number_that_is_not_finite_is_found_wherever_it_goes(
    tmp_path: Path, spoilt: int, value: float, rows: tuple[int, int]
) -> None:
    """Copied whole, in part, or not at all."""
    weights = random_weights()
    weights.view(-1)[spoilt] = value
    file = DirectFile(tmp_path / "a.safetensors", {"w": weights})

    def load() -> None:
        source = file.take("w")[slice(*rows)]
        if len(source):
            assert file.direct.copy(torch.empty(len(source), K), source)
        file.direct.settle()
        file.direct.wait()

    with (
        file.reader,
        pytest.raises(CheckpointError, match=r"^w: 1 of 3,145,728 weights in a\.safetensors are N"),
    ):
        load()


@pytest.fixture
def slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of tensors named `slow` or `w` are read late."""
    read = direct._read

    def read_late(piece: direct._Piece, fresh: FreshPages | None) -> None:
        if piece.offer.stored.name in ("slow", "w"):
            time.sleep(0.05)
        read(piece, fresh)

    monkeypatch.setattr(direct, "_read", read_late)


@pytest.mark.usefixtures("slowly")
def test_later_copy_to_the_same_place_wins(tmp_path: Path) -> None:
    tensors = {"slow": random_weights(), "second": random_weights() + 1}
    file = DirectFile(tmp_path / "a.safetensors", tensors)
    target = torch.empty(N, K)
    # more threads than a tensor has pieces
    with file.reader, DirectReads(num_threads=8) as reads:
        for name in ("slow", "second"):
            assert reads.copy(target, reads.offer(file.stored[name], file.reader))
    assert torch.equal(target, file.expected["second"])


@pytest.mark.usefixtures("slowly")
def test_leaving_waits_for_what_was_begun(file: DirectFile) -> None:
    target = torch.empty(N, K)
    with file.direct:
        file.direct.copy(target, file.take("w"))
    assert torch.equal(target, file.expected["w"])


@pytest.mark.usefixtures("slowly")
def test_nothing_is_written_after_an_error(file: DirectFile) -> None:
    target = torch.zeros(N, K)

    def fail() -> None:
        with file.direct:
            file.direct.copy(target, file.take("w"))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    left = target.clone()
    time.sleep(0.5)
    assert torch.equal(target, left)
    # one thread had begun with one piece or two, and there are twelve
    assert not target[-1].any()


def test_file_that_is_cut_short_while_it_is_read_raises(file: DirectFile) -> None:
    source = file.take("w")
    os.truncate(file.path, file.stored["w"].start + 5 * MIB)
    file.direct.copy(torch.empty(N, K), source)
    with pytest.raises(CheckpointError, match="ends inside 'w'"):
        file.direct.wait()


def test_what_was_begun_is_dropped_when_the_reader_is_closed(file: DirectFile) -> None:
    file.direct.copy(torch.empty(N, K), file.take("w"))
    file.reader.close()
    assert not file.direct.is_writing
    assert _file_pages(file.path) == 0


def test_tensors_without_numbers_that_could_be_wrong_are_read_too(tmp_path: Path) -> None:
    words = torch.randint(-(2**31), 2**31 - 1, (N, K), dtype=torch.int32)
    file = DirectFile(tmp_path / "a.safetensors", {"qweight": words})
    target = torch.empty(N, K, dtype=torch.int32)
    with file.reader:
        assert file.direct.copy(target, file.take("qweight"))
        file.direct.settle()
        file.direct.wait()
    assert torch.equal(target, words)
