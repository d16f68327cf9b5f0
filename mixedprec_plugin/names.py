"""Globs over layer names, and the names nearest to one that is not there.

A pattern matches a whole name, case-sensitively:

    *            any run of characters, dots included; may be empty
    ?            one character
    [abc] [a-z]  one character of a set; [!abc] one that is not
    {q,k,v}      one of several; may be nested and may hold the other wildcards
    {0..15}      a number of a range, as the shell counts ({00..15} pads, {0..14..2} steps)
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import re
import reprlib
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

import bracex

MAX_PATTERN_LENGTH = 4096
MAX_ALTERNATIVES = 10_000
MAX_DEPTH = 8
MAX_TESTS = 128
# of characters with characters, in one search for near names or in several: about two seconds
MAX_COMPARED = 10_000_000
_NUM_NEAR = 3

_ENDS = r"[-+]?\d{1,18}\.\.[-+]?\d{1,18}|[a-z]\.\.[a-z]|[A-Z]\.\.[A-Z]"
_RANGE = re.compile(rf"({_ENDS})(\.\.[-+]?\d{{1,18}})?", re.ASCII)
_BRACES = re.compile(r"\{([^{}]*)\}")
_SET = re.compile(r"\[[^\]]*\]")
# characters that no pattern holds: each stands for braces that were read
_FIRST = 0xE000
_READ = r"[\uE000-\uF8FF]"
_PIECE = re.compile(rf"\*+|{_READ}|(?:{_SET.pattern}|[^*\uE000-\uF8FF])+")
_WILDCARD = re.compile(rf"[*?[]|{_READ}")
_NUMBER = re.compile(r"\d+")
_MISTAKES = {
    "[": "opens a '[' that nothing closes",
    "]": "has a ']' that closes nothing",
    "{": "opens a '{' that nothing closes",
    "}": "has a '}' that closes nothing",
    ",": "has a ',' outside braces; write a list of patterns, or {a,b}",
}

_shortened = reprlib.Repr()
_shortened.maxstring = 100

# (name, where a part may start in it) -> where it may end
_Part = Callable[[str, Collection[int]], Collection[int]]


class _Group(NamedTuple):
    """Braces: what they match, how many words they list, tests they take, and braces they nest."""

    part: _Part
    num_words: int
    num_tests: int
    depth: int


class PatternError(ValueError):
    """A glob that cannot be read; its text says what to write instead."""


@functools.lru_cache(maxsize=256)
def compile_pattern(pattern: str) -> Callable[[str], bool]:
    """Turn a glob into a test of one layer name.

    A part is tried once at each place where it may start, so that the time grows with the length
    of the pattern times that of the name. A regular expression would try all combinations of
    stars and of alternatives of different lengths.

    Raises:
        PatternError: the pattern is malformed, or lists too many alternatives.
    """
    shown = _shortened.repr(pattern)
    _check(pattern, shown)
    groups: list[_Group] = []
    text = pattern
    num_words = num_in_ranges(pattern)
    while num_words <= MAX_ALTERNATIVES and (braces := _BRACES.search(text)):
        groups.append(_group(braces[1], groups, shown))
        num_words = max(num_words, sum(group.num_words for group in groups))
        text = f"{text[: braces.start()]}{chr(_FIRST + len(groups) - 1)}{text[braces.end() :]}"
    if num_words > MAX_ALTERNATIVES:
        what = f"the braces of {shown} list more than {MAX_ALTERNATIVES} alternatives"
        raise PatternError(f"{what}; use '*' or a shorter range")
    _refuse("{},", text, shown)
    if sum(group.num_tests for group in groups) > MAX_TESTS:
        what = f"{shown} has more than {MAX_TESTS} braces, or wildcards within them"
        raise PatternError(f"{what}; write several patterns")
    parts = _parts(text, groups)
    return lambda name: len(name) in _ends(parts, name, (0,))


def num_in_ranges(pattern: str) -> int:
    """How many numbers the ranges of a pattern list."""
    ranges = [text.split("..") for text in _BRACES.findall(pattern) if _RANGE.fullmatch(text)]
    numbers = [list(map(int, ends)) for ends in ranges if not ends[0].isalpha()]
    return sum(abs(last - first) // (abs(*step or [1]) or 1) + 1 for first, last, *step in numbers)


def _check(pattern: str, shown: str) -> None:
    if not pattern:
        raise PatternError("an empty pattern matches no layer; write '*' for all of them")
    if len(pattern) > MAX_PATTERN_LENGTH:
        what = f"a pattern of {len(pattern)} characters is too long"
        expected = f"(expected {MAX_PATTERN_LENGTH} at most)"
        raise PatternError(f"{what} {expected}; write several patterns")
    if pattern.startswith("re:"):
        raise PatternError(f"{shown} is a regular expression (expected a glob)")
    for token in _SET.findall(pattern):
        members = token[1:-1].removeprefix("!")
        if not members or re.search(r"[^\w.-]", members):
            expected = "expected '[abc]', '[a-z]' or '[!abc]'; for words write '{a,b}'"
            raise PatternError(f"'{token}' in {shown} is not a set of characters ({expected})")
        if len(members) > 3 and re.fullmatch(r"\d+-\d+", members):
            what = f"'{token}' in {shown} matches one character, not a range of numbers"
            raise PatternError(f"{what} (expected '{{{members.replace('-', '..')}}}')")
        for first, last in re.findall("(.)-(.)", members):
            if first > last:
                what = f"'{token}' in {shown} counts backwards"
                raise PatternError(f"{what}; write '{last}-{first}'")
    outside = _SET.sub("", pattern)
    _refuse("[]", outside, shown)
    for character in outside:
        what = f"{shown} has {character!r}, which no layer name has"
        if character in "\\^$()|+":
            remedy = "patterns are globs, not regular expressions"
            raise PatternError(f"{what}; {remedy}: '*', '?', '[…]', '{{a,b}}', '{{0..15}}'")
        if character.isspace() or not character.isprintable():
            raise PatternError(what)


def _refuse(characters: str, text: str, shown: str) -> None:
    for character in characters:
        if character in text:
            raise PatternError(f"{shown} {_MISTAKES[character]}")


def _group(content: str, groups: Sequence[_Group], shown: str) -> _Group:
    """Read what stands in braces; other braces within it were read before."""
    inner = [groups[ord(read) - _FIRST] for read in re.findall(_READ, content)]
    depth = 1 + max((group.depth for group in inner), default=0)
    if depth > MAX_DEPTH:
        what = f"{shown} nests braces more than {MAX_DEPTH} deep"
        raise PatternError(f"{what}; write several patterns")
    words = content.split(",")
    ranges = [word for word in words if _RANGE.fullmatch(word)]
    if ranges and len(words) > 1:
        what = f"'{ranges[0]}' in {shown} is no range beside a ','"
        raise PatternError(f"{what} (expected '{{{ranges[0]}}}' there)")
    if ranges:
        words = bracex.expand(f"{{{content}}}", limit=0)
    elif len(words) == 1:
        text = _shortened.repr(f"{{{re.sub(_READ, '{…}', content)}}}")
        if re.search(r"\.\.|\d\W+\d", content) and not inner:
            raise PatternError(f"{text} in {shown} is not a range (expected '{{0..15}}')")
        what = f"{text} in {shown} leaves nothing to choose"
        raise PatternError(f"{what} (expected '{{a,b}}' or '{{0..15}}'); leave the braces out")
    plain: dict[int, set[str]] = {}
    for word in words:
        if not _WILDCARD.search(word):
            plain.setdefault(len(word), set()).add(word)
    wild = [_parts(word, groups) for word in words if _WILDCARD.search(word)]
    num_tests = len(plain) + sum(map(len, wild))
    return _Group(functools.partial(_any_of, plain, wild), len(words), num_tests, depth)


def _parts(text: str, groups: Sequence[_Group]) -> list[_Part]:
    """The parts of a text in which a character stands for each braces."""
    parts: list[_Part] = []
    for piece in _PIECE.findall(text):
        if re.fullmatch(_READ, piece):
            parts.append(groups[ord(piece) - _FIRST].part)
        else:
            parts.append(_star if piece[0] == "*" else _fixed(piece))
    return parts


def _ends(parts: Sequence[_Part], name: str, starts: Collection[int]) -> Collection[int]:
    """Where some parts end, one behind another."""
    for part in parts:
        if not starts:
            break
        starts = part(name, starts)
    return starts


def _any_of(
    plain: dict[int, set[str]],
    wild: Sequence[Sequence[_Part]],
    name: str,
    starts: Collection[int],
) -> Collection[int]:
    """Where any of some words, by their length, or of some sequences of parts ends."""
    found = {
        at + length
        for length, words in plain.items()
        for at in starts
        if name[at : at + length] in words
    }
    return found.union(*(_ends(parts, name, starts) for parts in wild))


def _star(name: str, starts: Collection[int]) -> Collection[int]:
    return range(min(starts), len(name) + 1)


def _fixed(text: str) -> _Part:
    """A text of one length: characters, `?` and sets."""
    length = len(_SET.sub("?", text))
    if _WILDCARD.search(text):
        match = re.compile(fnmatch.translate(text)).match
        return lambda name, starts: {at + length for at in starts if match(name, at, at + length)}

    def ends(name: str, starts: Collection[int]) -> Collection[int]:
        if not isinstance(starts, range):
            return [at + length for at in starts if name.startswith(text, at)]
        found = []
        at = name.find(text, starts[0])
        while at >= 0:
            found.append(at + length)
            at = name.find(text, at + 1)
        return found

    return ends


class Nearest:
    """Finds the names that were meant, until much has been compared.

    Nothing takes longer than comparing: of thousands of unknown names the last ones get no answer.
    """

    def __init__(self) -> None:
        self._left = MAX_COMPARED

    def find(self, name: str, candidates: Collection[str]) -> list[str]:
        """Find the candidates that someone who typed a layer name, a glob or a key may have meant.

        Best first; empty where nothing is close. Candidates that differ in their numbers only count
        as one, so a model of 90,000 layers is compared by its few dozen distinct shapes, and the
        answer never lists one layer in 30 copies.
        """
        self._left -= len(name) + 4 * len(candidates)
        if self._left < 0:
            return []
        shapes: dict[str, list[str]] = {}
        for candidate in candidates:
            shapes.setdefault(without_numbers(candidate), []).append(candidate)
        wanted, numbers = _shape(name), _NUMBER.findall(name)
        self._left -= len(wanted) * sum(map(len, shapes))
        if self._left < 0:
            return []
        best = sorted((-_likeness(wanted, shape), shape) for shape in shapes)[:_NUM_NEAR]
        alike = [shapes[shape] for likeness, shape in best if likeness <= -0.6]
        return [next((c for c in some if _NUMBER.findall(c) == numbers), some[0]) for some in alike]


def nearest(name: str, candidates: Iterable[str]) -> list[str]:
    """Find near names once, as `Nearest` does."""
    return Nearest().find(name, list(candidates))


def without_numbers(name: str) -> str:
    """`model.layers.12.mlp` -> `model.layers.#.mlp`: the same for names that differ in numbers."""
    return _NUMBER.sub("#", name)


def _shape(name: str) -> str:
    """Fold numbers, ranges and stars between dots to `#`, as candidates are."""
    text = re.sub(r"\{\d+\.\.[^{}]*\}", "#", name)
    text = re.sub(r"(?<![^.])[*?](?![^.])", "#", text)
    return without_numbers(text)


def _likeness(wanted: str, shape: str) -> float:
    """From 0 to 1; a name typed without its prefix is compared with the same number of parts."""
    left, right = wanted.lower(), shape.lower()
    ratio = difflib.SequenceMatcher(None, left, right).ratio()
    bare = left.strip("#.*")
    parts, num_parts = right.split("."), bare.count(".") + 1
    if bare and num_parts < len(parts):
        end = ".".join(parts[-num_parts:])
        ratio = max(ratio, 0.95 * difflib.SequenceMatcher(None, bare, end).ratio())
    return ratio


def fold_numbers(numbers: Iterable[int]) -> str:
    """`[0, 1, 2, 5]` -> `0-2,5`."""
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges_of(numbers))


def ranges_of(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """`[0, 1, 2, 5]` -> `[(0, 2), (5, 5)]`."""
    ranges: list[tuple[int, int]] = []
    for number in sorted(set(numbers)):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], number)
        else:
            ranges.append((number, number))
    return ranges


def unfold_numbers(text: str) -> list[range]:
    """Undo `fold_numbers`."""
    runs = (run.partition("-") for run in text.split(","))
    return [range(int(first), int(last or first) + 1) for first, _, last in runs]
