from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixedprec_plugin.names import compile_pattern
from mixedprec_plugin.plan.matching import Candidates

NAMES = [
    f"{prefix}.{layer}.{child}"
    for prefix in ("model.layers", "visual.blocks", "layers")
    for layer in (-2, -1, 0, 1, 7, 17)
    for child in ("mlp.up", "7.17", *(f"mlp.experts.{e}.w{n}" for e in (1, 7, 17) for n in (1, 2)))
]
PARTS = (
    "*", "**", "model", "layers", "*layers", "layers*", "visual", "mlp", "experts", "{mlp,x}", "?",
    "7", "17", "-1", "{1,7}", "{1,17,7}", "{0..7}", "[17]", "1[7]", "{1.mlp,7.mlp}", "w1", "w{1,2}",
)  # fmt: skip


@given(st.lists(st.sampled_from(PARTS), min_size=1, max_size=7))
def test_narrowing_loses_no_name(parts: list[str]) -> None:
    pattern = ".".join(parts)
    matches = compile_pattern(pattern)
    candidates = Candidates(NAMES)
    expected = {name for name in NAMES if matches(name)}
    for _ in range(12):  # the first few are not narrowed
        assert set(candidates.match(pattern)) == expected


@pytest.mark.parametrize(
    ("pattern", "num_candidates"),
    [
        ("model.layers.7.*", 16),
        ("*.experts.{1,7}.w1", 72),
        ("*.layers.17.mlp.experts.{1,7}.*", 8),
        ("model.layers.17.mlp.experts.7.*", 4),
        ("*layers.7.*", len(NAMES)),
        ("*.w1", len(NAMES)),
    ],
)
def test_numbers_narrow(pattern: str, num_candidates: int) -> None:
    candidates = Candidates(NAMES)
    for _ in range(12):
        candidates.match(pattern)
    assert len(candidates._narrowed(pattern)) == num_candidates
