"""How files are read: mapped or not, and what becomes of their pages."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mixedprec_plugin.checkpoint.ahead import ReadAhead
from mixedprec_plugin.checkpoint.headers import StoredTensor
from mixedprec_plugin.checkpoint.reader import Reader, Reading
from mixedprec_plugin.checkpoint.source import open_source


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.arange(1 << 19, dtype=torch.float32).view(1 << 10, -1)


@pytest.fixture
def stored(tmp_path: Path, weight: torch.Tensor) -> StoredTensor:
    save_file({"a.weight": weight}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    return open_source(tmp_path).tensors["a.weight"]


def is_mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("may_map", [True, False])
@pytest.mark.parametrize("ahead", [True, False])
def test_large_tensor_is_mapped_only_if_it_may_be(
    stored: StoredTensor, weight: torch.Tensor, may_map: bool, ahead: bool
) -> None:
    how = Reading(may_map=may_map)
    with ReadAhead([stored], how) if ahead else Reader(how) as reader:
        value = reader.read_finite(stored)
        assert is_mapped(stored.path) == may_map
        assert torch.equal(value, weight)


@pytest.mark.parametrize("drops", [True, False])
def test_pages_are_dropped_if_that_is_asked_for(
    stored: StoredTensor, monkeypatch: pytest.MonkeyPatch, drops: bool
) -> None:
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
