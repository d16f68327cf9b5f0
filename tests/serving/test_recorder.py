"""What sees every write while a model loads."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mixedprec_plugin.checkpoint.headers import read_header
from mixedprec_plugin.checkpoint.reader import Reader
from mixedprec_plugin.serving.recorder import WriteRecorder, storage_id

N, K = 1024, 512


def test_writes_are_counted_and_followed_from_the_file_to_the_parameter(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    weights = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    save_file({"w": weights, "small": torch.ones(3), "unused": torch.ones(3)}, path)
    target, other = torch.zeros(2 * N, K), torch.zeros(3)
    with Reader() as reader:
        values = {name: reader.read(tensor) for name, tensor in read_header(path).items()}
    with WriteRecorder() as recorder:
        for name, value in values.items():
            recorder.follow(name, value)
        target[N:].copy_(values["w"])
        other.copy_(values["small"].half())
    assert torch.equal(target[N:], weights)
    assert torch.equal(other, torch.ones(3))
    assert [recorder.written[storage_id(x)] for x in (target, other)] == [N * K, 3]
    assert recorder.arrived == {"w": {storage_id(target)}, "small": {storage_id(other)}}


def test_weights_that_a_loader_changes_are_placed_as_changed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    weights = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    save_file({"w": weights}, path)
    target = torch.empty(N, K)
    with Reader() as reader:
        source = reader.read(read_header(path)["w"])
    with WriteRecorder():
        source[1].mul_(2)
        target.copy_(source)
    expected = weights.clone()
    expected[1] *= 2
    assert torch.equal(target, expected)
    assert torch.equal(load_file(path)["w"], weights)
