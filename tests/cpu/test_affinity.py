"""Cores -> ranks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixedprec_plugin.cpu.affinity import format_binding, split_cores


@given(st.sets(st.integers(0, 300), min_size=1), st.integers(1, 16))
def test_every_rank_gets_cores_and_none_is_shared_needlessly(cores, num_ranks):
    cores = sorted(cores)
    split = split_cores(cores, num_ranks)
    assert len(split) == num_ranks
    assert all(split)
    if num_ranks <= len(cores):
        assert [core for part in split for core in part] == cores
        assert max(map(len, split)) - min(map(len, split)) <= 1


@pytest.mark.parametrize(
    ("cores", "num_ranks", "text"),
    [
        ([0, 1], 2, "0|1"),
        ([0, 1, 2, 3], 2, "0,1|2,3"),
        ([0, 1, 2, 3, 4], 3, "0|1,2|3,4"),
        ([4, 6], 3, "4|6|4"),
    ],
)
def test_binding_is_spelled_as_sglang_reads_it(cores, num_ranks, text):
    assert format_binding(split_cores(cores, num_ranks)) == text
