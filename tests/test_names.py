from __future__ import annotations

import re
import time

import bracex
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wcmatch import fnmatch

from mixedprec_plugin.names import PatternError, compile_pattern, nearest

FLAGS = fnmatch.BRACE | fnmatch.CASE | fnmatch.DOTMATCH | fnmatch.FORCEUNIX

Q0 = "model.layers.0.self_attn.q_proj"
LAYERS = [
    f"model.layers.{layer}.{name}"
    for layer in range(40)
    for name in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.o_proj",
        "mlp.down_proj",
        "input_layernorm",
    )
] + ["lm_head", "model.embed_tokens", "model.norm"]


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("*", Q0, True),
        ("*.q_proj", Q0, True),
        ("q_proj", Q0, False),
        ("model.layers.0", Q0, False),
        ("model.layers.?.*", "model.layers.12.mlp", False),
        ("model.layers.??.*", "model.layers.12.mlp", True),
        ("*.{q,k,v}_proj", Q0, True),
        ("*.{q,k,v}_proj", "a.o_proj", False),
        ("*.[qk]_proj", Q0, True),
        ("*.[!qk]_proj", Q0, False),
        ("*.[a-p]_proj", Q0, False),
        ("layers.{0..3}", "layers.3", True),
        ("layers.{0..3}", "layers.30", False),
        ("layers.{0..3}.*", "layers.30.mlp", False),
        ("layers.{0..15}", "layers.01", False),
        ("layers.{00..15}", "layers.01", True),
        ("layers.{0..8..4}", "layers.4", True),
        ("layers.{0..8..4}", "layers.5", False),
        ("layers.{3..0}", "layers.1", True),
        ("*.{mlp.{gate,up},self_attn.q}_proj", "x.mlp.up_proj", True),
        ("*.{mlp.{gate,up},self_attn.q}_proj", "x.mlp.q_proj", False),
        ("a{,.b}", "a", True),
        ("a{,.b}", "a.b", True),
        ("*.Q_proj", Q0, False),
        ("lm_head", "LM_HEAD", False),
        ("a.b", "axb", False),
        ("*{ab,a}*b", "ab", True),
        ("*a*b*c*", "xaybzc", True),
        ("*a*b*c*", "cba", False),
        ("**", "", True),
    ],
)
def test_pattern_matches_whole_names_by_case(pattern: str, name: str, expected: bool) -> None:
    assert compile_pattern(pattern)(name) is expected


pieces = st.sampled_from(["a", "b", "ab", ".", "1", "10", "*", "?", "[ab]", "[!a]", "[a-c]"])
braces = st.recursive(
    st.lists(pieces, max_size=3).map("".join),
    lambda words: st.lists(words, min_size=2, max_size=3).map(lambda w: "{" + ",".join(w) + "}"),
    max_leaves=6,
).filter(bool)
ranges = st.sampled_from(["{0..2}", "{9..11}", "{2..0}", "{00..02}", "{0..10..5}", "{a..c}"])
patterns = st.lists(pieces | braces | ranges, min_size=1, max_size=5).map("".join)
names = st.text("ab.01", max_size=10)


@settings(deadline=None)
@given(patterns, st.lists(names, min_size=1, max_size=10))
def test_patterns_agree_with_wcmatch(pattern: str, candidates: list[str]) -> None:
    matches = compile_pattern(pattern)
    expected = fnmatch.compile(pattern, flags=FLAGS, limit=0)
    for name in candidates:
        # wcmatch never matches an empty name with '*'; no layer has one.
        if name:
            assert matches(name) == expected.match(name), (pattern, name)


@given(st.lists(braces | ranges | st.sampled_from(["a", ".", "1"]), min_size=1, max_size=4))
def test_pattern_without_wildcards_matches_what_bash_expands_it_to(parts: list[str]) -> None:
    pattern = re.sub(r"\[[^]]*\]|[*?]", "x", "".join(parts))
    matches = compile_pattern(pattern)
    words = bracex.expand(pattern, limit=100_000, return_empty=True)
    assert all(matches(word) for word in words)
    assert not any(matches(word + "y") for word in words)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("", "an empty pattern matches no layer; write '*' for all of them"),
        ("a{b", "'a{b' opens a '{' that nothing closes"),
        ("a}b", "'a}b' has a '}' that closes nothing"),
        ("a]b", "'a]b' has a ']' that closes nothing"),
        ("[ab", "'[ab' opens a '[' that nothing closes"),
        (
            "a.{b}",
            "'{b}' in 'a.{b}' leaves nothing to choose (expected '{a,b}' or '{0..15}'); "
            "leave the braces out",
        ),
        ("{0..}", "'{0..}' in '{0..}' is not a range (expected '{0..15}')"),
        ("{0..x}", "'{0..x}' in '{0..x}' is not a range (expected '{0..15}')"),
        ("{0..3,7}", "'0..3' in '{0..3,7}' is no range beside a ',' (expected '{0..3}' there)"),
        (
            "q_proj,k_proj",
            "'q_proj,k_proj' has a ',' outside braces; write a list of patterns, or {a,b}",
        ),
        (
            "[{a,b}]",
            "'[{a,b}]' in '[{a,b}]' is not a set of characters "
            "(expected '[abc]', '[a-z]' or '[!abc]'; for words write '{a,b}')",
        ),
        (
            "[10|11]",
            "'[10|11]' in '[10|11]' is not a set of characters "
            "(expected '[abc]', '[a-z]' or '[!abc]'; for words write '{a,b}')",
        ),
        (
            "a.[10-15]",
            "'[10-15]' in 'a.[10-15]' matches one character, not a range of numbers "
            "(expected '{10..15}')",
        ),
        ("a.{0-2}", "'{0-2}' in 'a.{0-2}' is not a range (expected '{0..15}')"),
        ("[z-a]", "'[z-a]' in '[z-a]' counts backwards; write 'a-z'"),
        ("re:.*q_proj", "'re:.*q_proj' is a regular expression (expected a glob)"),
        (
            r"layers\.0",
            r"'layers\\.0' has '\\', which no layer name has; patterns are globs, not regular "
            "expressions: '*', '?', '[…]', '{a,b}', '{0..15}'",
        ),
        ("a b", "'a b' has ' ', which no layer name has"),
        (
            "{0..1000000000}",
            "the braces of '{0..1000000000}' list more than 10000 alternatives; "
            "use '*' or a shorter range",
        ),
        (
            "{{{{{{{{{a,b},c},c},c},c},c},c},c},c}",
            "'{{{{{{{{{a,b},c},c},c},c},c},c},c},c}' nests braces more than 8 deep; "
            "write several patterns",
        ),
        (
            "{" + ",".join(["*a"] * 65) + "}",
            f"'{{{'*a,' * 15}*...{'*a,' * 15}*a}}' has more than 128 braces, or wildcards within "
            "them; write several patterns",
        ),
        (
            "{" + "0" * 4000 + "..9}",
            f"'{{{'0' * 46}...{'0' * 44}..9}}' in '{{{'0' * 46}...{'0' * 44}..9}}' is not a range "
            "(expected '{0..15}')",
        ),
        (
            "x" * 5000,
            "a pattern of 5000 characters is too long (expected 4096 at most); "
            "write several patterns",
        ),
    ],
)
def test_malformed_pattern_says_what_to_write(pattern: str, message: str) -> None:
    with pytest.raises(PatternError) as caught:
        compile_pattern(pattern)
    assert str(caught.value) == message


def test_braces_do_not_multiply() -> None:
    matches = compile_pattern("{0..99}." * 20 + "x")
    assert matches("7." * 20 + "x")
    assert not matches("100." * 20 + "x")


@pytest.mark.parametrize(
    "pattern",
    ["*{?,??}*{?,??}*{?,??}*{?,??}zz", "{?,??}" * 40 + "z", "*{a,aa}" * 60 + "b", "*a" * 2000,
     "{{*a,*b},*{*c,d{?,??}}}*" * 8 + "z", "{" + "*a*b,*b*a," * 15 + "*}{,?}z"],
)  # fmt: skip
def test_no_pattern_takes_more_than_its_length_times_that_of_the_name(pattern: str) -> None:
    matches = compile_pattern(pattern)
    start = time.process_time()
    assert not any([matches("ab" * 20 + "a" * 40)] * 20)
    assert time.process_time() - start < 2


def test_many_stars_stay_fast_on_a_long_name() -> None:
    assert not compile_pattern("*a" * 100 + "b")("a" * 2000)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.7.self_atn.q_proj", "model.layers.7.self_attn.q_proj"),
        ("model.layers.*.self_atn.q_proj", "model.layers.0.self_attn.q_proj"),
        ("model.layers.{3..9}.self_attn.k_prj", "model.layers.0.self_attn.k_proj"),
        ("down_prj", "model.layers.0.mlp.down_proj"),
        ("LM_head", "lm_head"),
        ("embed_token", "model.embed_tokens"),
    ],
)
def test_nearest_names_the_layer_that_was_meant(name: str, expected: str) -> None:
    assert nearest(name, LAYERS)[0] == expected


def test_nearest_counts_numbered_copies_of_a_layer_once() -> None:
    found = nearest("model.layers.2.self_attn.x_proj", LAYERS)
    assert [name.rpartition(".")[2] for name in found] == ["k_proj", "o_proj", "q_proj"]
    assert all(".2." in name for name in found)


def test_nearest_stays_silent_where_nothing_is_close() -> None:
    assert nearest("zzz", LAYERS) == []
