"""What is said while weights are read."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from mixedprec_plugin.compose.stream import VirtualCheckpoint
from mixedprec_plugin.serving.progress import reported
from tests.checkpoints import write_llama
from tests.presets import plan

LINE = re.compile(r"mixedprec: (\d+) of 29 layers, .* of 3\.5 MiB, [\d.]+ [KM]?i?B/s, (\d+) s left")


@pytest.mark.parametrize(("seconds", "is_told"), [(2, True), (0.1, False)])
def test_a_load_that_takes_long_is_told_of(tmp_path: Path, seconds: float, is_told: bool) -> None:
    made = plan(write_llama(tmp_path / "model"), 'match: "*.mlp.*", method: awq')
    stream = VirtualCheckpoint(made)
    ticks, lines = itertools.count(), []
    names = [name for name, _ in reported(stream, lines.append, lambda: next(ticks) * seconds)]
    assert names == [name for name, _ in stream]
    assert bool(lines) == is_told
    found = [tuple(map(int, LINE.fullmatch(line).groups())) for line in lines]
    assert found == sorted(found)
    assert [left for _, left in found] == sorted((left for _, left in found), reverse=True)
