"""What sees every write while a model loads, and has large tensors read directly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixedprec_plugin.checkpoint.ahead import ReadAhead
from mixedprec_plugin.checkpoint.direct import DirectReads
from mixedprec_plugin.checkpoint.headers import read_header
from mixedprec_plugin.serving.recorder import WriteRecorder

N, K = 3072, 1024


class File:
    """A file with a large and a small tensor, and what reads it."""

    def __init__(self, path: Path) -> None:
        weights = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
        save_file({"w": weights, "small": torch.ones(3)}, path)
        self.path = path
        self.expected = {name: tensor.clone() for name, tensor in load_file(path).items()}
        self.stored = read_header(path)
        self.direct = DirectReads(num_threads=2)
        self.reader = ReadAhead(self.stored.values(), direct=self.direct)

    def take(self, name: str) -> torch.Tensor:
        return self.reader.read_to_place(self.stored[name])


@pytest.fixture
def file(tmp_path: Path) -> Iterator[File]:
    made = File(tmp_path / "a.safetensors")
    with made.reader:
        yield made


def test_copies_are_counted_where_they_are_read_directly(file: File) -> None:
    target, other = torch.zeros(2 * N, K), torch.zeros(3)
    with WriteRecorder(file.direct) as recorder:
        target[N:].copy_(file.take("w"))
        other.copy_(file.take("small"))
        assert file.direct.is_writing
    file.direct.wait()
    assert torch.equal(target[N:], file.expected["w"])
    assert torch.equal(other, file.expected["small"])
    counts = [recorder.written[int(x.untyped_storage()._cdata)] for x in (target, other)]
    assert counts == [N * K, 3]


def test_operation_on_a_parameter_waits_for_its_weights(file: File) -> None:
    target = torch.zeros(2 * N, K)
    with WriteRecorder(file.direct):
        target[N:].copy_(file.take("w"))
        # another part
        target[:N].fill_(1)
        assert file.direct.is_writing
        target.mul_(2)
        assert not file.direct.is_writing
    assert torch.equal(target[N:], 2 * file.expected["w"])
    assert bool((target[:N] == 2).all())


def test_weights_that_a_loader_changes_are_placed_as_changed(file: File) -> None:
    target = torch.empty(N, K)
    with WriteRecorder(file.direct):
        source = file.take("w")
        source[1].mul_(2)
        target.copy_(source)
    expected = file.expected["w"].clone()
    expected[1] *= 2
    file.direct.settle()
    file.direct.wait()
    assert torch.equal(target, expected)
    assert torch.equal(load_file(file.path)["w"], file.expected["w"])
