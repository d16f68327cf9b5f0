"""Layers that are kept for the next start: the same bytes, and only while nothing changed."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from mixedprec_plugin.checkpoint.headers import StoredTensor
from mixedprec_plugin.checkpoint.reader import Reader
from mixedprec_plugin.compose.cache import LayerCache, entries
from mixedprec_plugin.compose.parts import compose_parts
from mixedprec_plugin.compose.stream import VirtualCheckpoint
from mixedprec_plugin.plan.model import Plan
from tests.checkpoints import write_llama
from tests.presets import plan
from tests.tensors import raw

RULES = ('match: "*", method: gptq, group_size: 64', 'match: "*.mlp.*", method: awq')
LAYERS = 7


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "model", num_hidden_layers=1)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The weights of projections that are read."""
    names: list[str] = []

    class Noting(Reader):
        def read_part(self, tensor: StoredTensor, box: Sequence[range]) -> torch.Tensor:
            if "_proj" in tensor.name:
                names.append(tensor.name)
            return super().read_part(tensor, box)

    monkeypatch.setattr("mixedprec_plugin.compose.stream.Reader", Noting)
    return names


def cache_of(made: Plan, folder: Path, max_bytes: int = 1 << 30) -> LayerCache:
    return LayerCache(folder, max_bytes, made.source.facts)


def composed(made: Plan, cache: LayerCache | None) -> dict[str, torch.Tensor]:
    """Every tensor, copied as a weight loader does."""
    compose = functools.partial(compose_parts, cache=cache)
    stream = VirtualCheckpoint(made, compose=compose)
    return {name: torch.empty_like(t, device="cpu").copy_(t) for name, t in stream}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(raw(tensor), raw(second[name])) for name, tensor in first.items()
    )


def test_second_time_gives_the_same_bytes_and_reads_no_weight(
    model: Path, tmp_path: Path, read: list[str]
) -> None:
    made, folder = plan(model, *RULES), tmp_path / "cache"
    plain = dict(iter(VirtualCheckpoint(made)))
    first = cache_of(made, folder)
    assert same(composed(made, first), plain)
    assert (first.num_found, first.num_kept) == (0, first.num_kept)
    read.clear()
    second = cache_of(made, folder)
    assert same(composed(made, second), plain)
    assert (second.num_found, second.num_kept) == (first.num_kept, 0)
    assert not read


def test_rule_that_changes_has_its_own_layers_made_anew(
    model: Path, tmp_path: Path, read: list[str]
) -> None:
    folder = tmp_path / "cache"
    before = plan(model, *RULES)
    composed(before, cache_of(before, folder))
    read.clear()
    after = plan(model, RULES[0], 'match: "*.mlp.*", method: awq, group_size: 64')
    tensors = composed(after, cache_of(after, folder))
    assert {name.split(".")[3] for name in read} == {"mlp"}
    assert same(tensors, dict(iter(VirtualCheckpoint(after))))


def test_source_that_changes_is_quantized_anew(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    before = plan(model, *RULES)
    composed(before, cache_of(before, folder))
    file = model / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1000] ^= 1  # of the last weights
    stat = file.stat()
    file.write_bytes(data)
    # whatever can be set is as it was
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = plan(model, *RULES)
    cache = cache_of(after, folder)
    assert same(composed(after, cache), dict(iter(VirtualCheckpoint(after))))
    assert cache.num_found == 0


def test_damaged_entries_are_made_anew(model: Path, tmp_path: Path) -> None:
    made, folder = plan(model, *RULES), tmp_path / "cache"
    plain = composed(made, cache_of(made, folder))
    for number, path in enumerate(sorted(folder.glob("??/*"))):
        path.write_bytes(path.read_bytes()[: -1 - number] if number % 2 else b"")
    cache = cache_of(made, folder)
    assert same(composed(made, cache), plain)
    assert cache.num_found == 0
    again = cache_of(made, folder)
    assert same(composed(made, again), plain)
    assert again.num_found == cache.num_kept


def test_what_was_used_longest_ago_goes_first(model: Path, tmp_path: Path) -> None:
    made, folder = plan(model, *RULES), tmp_path / "cache"
    cache = cache_of(made, folder)
    composed(made, cache)
    kept = sorted(entries(folder), key=lambda entry: entry.path)
    for age, entry in enumerate(kept):
        os.utime(entry.path, (1e9 - age, 1e9 - age))
    left = next(folder.glob("??")) / "interrupted.part"
    left.write_bytes(b"half")
    os.utime(left, (1e9, 1e9))
    bound = sum(entry.num_bytes for entry in kept[:3])
    cache_of(made, folder, bound).trim()
    now = {entry.path for entry in entries(folder)}
    assert sum(path.stat().st_size for path in now) <= bound
    assert now == {entry.path for entry in kept[: len(now)]}
    assert len(now) in (2, 3)  # what was interrupted took its place, too
    assert not left.exists()


def test_starts_at_once_keep_each_entry_whole(model: Path, tmp_path: Path) -> None:
    made, folder = plan(model, *RULES), tmp_path / "cache"
    plain = dict(iter(VirtualCheckpoint(made)))
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: composed(made, cache_of(made, folder)), range(3)))
    assert all(same(tensors, plain) for tensors in found)
    assert same(composed(made, cache_of(made, folder)), plain)
    assert not list(folder.glob("??/*.part"))


def test_disk_without_room_keeps_nothing_and_says_so(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, folder = plan(model, *RULES), tmp_path / "cache"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))
    cache = cache_of(made, folder)
    assert same(composed(made, cache), dict(iter(VirtualCheckpoint(made))))
    assert (cache.num_kept, cache.stopped) == (0, "less than 5% of the disk is free")


def test_code_that_changes_has_other_entries(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, folder = plan(model, *RULES), tmp_path / "cache"
    composed(made, cache_of(made, folder))
    monkeypatch.setattr("mixedprec_plugin.compose.cache._code_digest", lambda: "another release")
    cache = cache_of(made, folder)
    composed(made, cache)
    assert cache.num_found == 0
