from __future__ import annotations

import re
import time
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixedprec_plugin.checkpoint.patterns import matches
from mixedprec_plugin.errors import CheckpointError

NAME = "model.layers.10.self_attn.q_proj"


def _several(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    pair = st.tuples(inner, inner)
    often = st.sampled_from(["*", "+", "?", "*?", "+?", "??", "{2}", "{1,3}", "{,2}?", "{2,}"])
    around = st.sampled_from(
        ["(?:%s)", "(%s)", "(?P<n>%s)", "(?=%s)", "(?!%s)", "(?<=%s)", "(?<!%s)"]
    )
    return st.one_of(
        pair.map("".join),
        pair.map("(?:%s|%s)".__mod__),
        st.tuples(inner, often).map("(?:%s)%s".__mod__),
        st.tuples(around, inner).map(lambda parts: parts[0] % parts[1]),
    )


ONE = st.sampled_from(
    [
        "a",
        "b",
        ".",
        r"\.",
        "[ab]",
        "[^a]",
        r"\d",
        r"\w",
        "",
        "^",
        "$",
        r"\b",
        r"\B",
        "a*",
        "b+?",
        ".*",
    ]
)


@given(st.recursive(ONE, _several, max_leaves=12), st.text("ab.0", max_size=8), st.booleans())
def test_patterns_match_what_re_matches(pattern: str, name: str, whole: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            expected = (re.fullmatch if whole else re.match)(pattern, name) is not None
        except re.error:
            with pytest.raises(CheckpointError):
                matches(pattern, name, whole=whole)
            return
        assert matches(pattern, name, whole=whole) == expected


@pytest.mark.parametrize(
    "pattern",
    [
        r"(([a-z.0-9_]+)+)+$!",
        r"^(([a-z._0-9])+.)+[A-Z]([a-z])+$",
        r"(a|a|b|[a-z_.0-9])*X?(?!.)Q?(?=Z)",
        r"(.*?,){25}P",
        r".*.*.*.*.*.*.*.*.*.*!",
        r"(?:a|[a-z]|.)" * 40 + "!",
        r"(?=.*" * 20 + "!" + ")" * 20,
        r"(([a-z.0-9_]+)+)+(?<=(a|[a-z])(a|[a-z])(a|[a-z])!)",
    ],
)
def test_patterns_with_ways_without_end_are_soon_done(pattern: str) -> None:
    start = time.process_time()
    assert not matches(pattern, NAME * 3)
    assert not matches(pattern, NAME * 3, whole=True)
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "missing "),
        ("a" * 100_000, "longer than"),
        ("(" * 5000 + ")" * 5000, "recursion"),
        ("a{99999999999999}", "repetition number is too large"),
        ("(?:(?:(?:a{900}){900}){900}){900}", "more than 2048 steps"),
        (r"(a+)\1+.*", "groupref beside repetitions"),
    ],
)
def test_patterns_that_cannot_be_followed_are_refused(pattern: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        matches(pattern, NAME)
