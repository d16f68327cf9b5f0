"""What sees every write while a model loads, and has large tensors read directly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from mixedprec_plugin.serving.recorder import WriteRecorder
from tests.direct import DirectFile, K, N, random_weights


@pytest.fixture
def file(tmp_path: Path) -> Iterator[DirectFile]:
    made = DirectFile(tmp_path / "a.safetensors", {"w": random_weights(), "small": torch.ones(3)})
    with made.reader:
        yield made


def test_copies_are_counted_where_they_are_read_directly(file: DirectFile) -> None:
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


def test_operation_on_a_parameter_waits_for_its_weights(file: DirectFile) -> None:
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


def test_weights_that_a_loader_changes_are_placed_as_changed(file: DirectFile) -> None:
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


class _Threads(TorchDispatchMode):
    """With how many threads torch copies."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.seen.append(torch.get_num_threads())
        return func(*args, **(kwargs or {}))


def test_small_copies_leave_the_cores_to_those_who_read(file: DirectFile) -> None:
    """A thread of OpenMP's that has nothing to do keeps its core busy for a while."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with _Threads() as threads, WriteRecorder(file.direct):
            torch.zeros(3).copy_(file.take("small"))
            # columns are not read directly
            torch.zeros(N, 512).copy_(file.take("w")[:, 512:])
            torch.zeros(3).copy_(torch.ones(3))
        assert threads.seen == [1, 3, 1]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(num_threads)
