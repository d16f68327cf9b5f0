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

import bracex

MAX_PATTERN_LENGTH = 4096
MAX_ALTERNATIVES = 10_000
MAX_DEPTH = 8
MAX_TESTS = 256

_ENDS = r"[-+]?\d{1,18}\.\.[-+]?\d{1,18}|[a-z]\.\.[a-z]|[A-Z]\.\.[A-Z]"
_RANGE = re.compile(rf"({_ENDS})(\.\.[-+]?\d{{1,18}})?", re.ASCII)
_TOKEN = re.compile(r"\[[^\]]*\]?|.", re.DOTALL)
_SET = re.compile(r"\[[^\]]*\]")
_PIECE = re.compile(rf"\*+|(?:{_SET.pattern}|[^*])+")
_WILDCARD = re.compile(r"[*?[]")
_NUMBER = re.compile(r"\d+")

_shortened = reprlib.Repr()
_shortened.maxstring = 100

# (name, where a part may start in it) -> where it may end
_Part = Callable[[str, Collection[int]], Collection[int]]


class PatternError(ValueError):
    """A glob that cannot be read; its text says what to write instead."""


@functools.lru_cache(maxsize=256)
def compile_pattern(pattern: str) -> Callable[[str], bool]:
    """Turn a glob into a test of one layer name.

    A part is tried once at each place where it may start, so that the time grows with the length
    of the pattern times that of the name. A regular expression would try all combinations of
    stars and of alternatives of different lengths.

    Args:
        pattern: the glob; see the module's docstring.
    Returns:
        A function of a whole layer name, true where the pattern matches.
    Raises:
        PatternError: the pattern is malformed, or expands to too many alternatives.
    """
    if not pattern:
        raise PatternError("an empty pattern matches no layer; write '*' for all of them")
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise PatternError(
            f"a pattern of {len(pattern)} characters is too long (expected {MAX_PATTERN_LENGTH} "
            "at most); write several patterns"
        )
    if pattern.startswith("re:"):
        raise PatternError(f"{pattern!r} is a regular expression (expected a glob)")
    parts: list[_Part] = []
    at = num_words = num_tests = 0
    for start, end in _braces(pattern):
        words = _expand(pattern[start:end], MAX_ALTERNATIVES - num_words, pattern)
        group, tests = _group(words)
        num_words += len(words)
        num_tests += tests
        parts += [*_parts(pattern[at:start]), group]
        at = end
    if num_tests > MAX_TESTS:
        raise PatternError(
            f"{_shortened.repr(pattern)} has more than {MAX_TESTS} braces, or wildcards within "
            "them; write several patterns"
        )
    ends = _sequence([*parts, *_parts(pattern[at:])])
    return lambda name: len(name) in ends(name, (0,))


def _braces(pattern: str) -> list[tuple[int, int]]:
    """Check a pattern, and return where its outermost braces start and end."""
    shown = _shortened.repr(pattern)
    spans: list[tuple[int, int]] = []
    opened: list[list[int]] = []  # where the choices of each open brace start
    for match in _TOKEN.finditer(pattern):
        token, at = match.group(), match.start()
        if token == "{":
            opened.append([at + 1])
            if len(opened) > MAX_DEPTH:
                raise PatternError(
                    f"{shown} nests braces more than {MAX_DEPTH} deep; write several patterns"
                )
        elif token in ("}", ",") and opened:
            _check_choice(pattern, opened[-1], at)
            opened[-1].append(at + 1)
            if token == "}" and len(opened) == 1:
                spans.append((opened[0][0] - 1, at + 1))
            if token == "}":
                opened.pop()
        else:
            _check_token(token, shown)
    if opened:
        raise PatternError(f"{shown} opens a '{{' that nothing closes")
    return spans


def _check_choice(pattern: str, starts: Sequence[int], end: int) -> None:
    """Check one choice of a brace, which ends at its `,` or `}`."""
    shown, choice = _shortened.repr(pattern), pattern[starts[-1] : end]
    is_range = _RANGE.fullmatch(choice) is not None
    is_alone = len(starts) == 1 and pattern[end] == "}"
    if is_range and not is_alone:
        raise PatternError(
            f"'{choice}' in {shown} is no range beside a ',' (expected '{{{choice}}}' there)"
        )
    if is_alone and not is_range and ".." in choice and "{" not in choice:
        raise PatternError(f"'{{{choice}}}' in {shown} is not a range (expected '{{0..15}}')")
    if is_alone and not is_range:
        raise PatternError(
            f"{f'{{{choice}}}'!r} in {shown} leaves nothing to choose "
            "(expected '{a,b}' or '{0..15}'); leave the braces out"
        )


def _check_token(token: str, shown: str) -> None:
    """Check one character outside of sets, or one set."""
    if token == "[":
        raise PatternError(f"{shown} opens a '[' that nothing closes")
    if token[0] == "[":
        _check_set(token, shown)
    elif token in "]}":
        raise PatternError(f"{shown} has a {token!r} that closes nothing")
    elif token == ",":
        raise PatternError(
            f"{shown} has a ',' outside braces; write a list of patterns, or {{a,b}}"
        )
    elif token in "\\^$()|+":
        raise PatternError(
            f"{shown} has {token!r}, which no layer name has; patterns are globs, "
            "not regular expressions: '*', '?', '[…]', '{a,b}', '{0..15}'"
        )
    elif token.isspace() or not token.isprintable():
        raise PatternError(f"{shown} has {token!r}, which no layer name has")


def _check_set(token: str, shown: str) -> None:
    members = token[1:-1].removeprefix("!")
    if token[-1] != "]":
        raise PatternError(f"{shown} opens a '[' that nothing closes")
    if not members or any(character in "[]{},^\\!" for character in members):
        raise PatternError(
            f"'{token}' in {shown} is not a set of characters "
            "(expected '[abc]', '[a-z]' or '[!abc]'; for words write '{a,b}')"
        )
    for first, last in re.findall("(.)-(.)", members):
        if first > last:
            raise PatternError(f"'{token}' in {shown} counts backwards; write '{last}-{first}'")


def _expand(brace: str, limit: int, pattern: str) -> list[str]:
    """The words that an outermost brace stands for."""
    try:
        # behind a character, as an empty word alone is left out
        return [word[1:] for word in bracex.expand(f"x{brace}", limit=max(1, limit))]
    except bracex.ExpansionLimitException:
        raise PatternError(
            f"the braces of {_shortened.repr(pattern)} list more than {MAX_ALTERNATIVES} "
            "alternatives; use '*' or a shorter range"
        ) from None


def _parts(text: str) -> list[_Part]:
    """The parts of a text without braces."""
    return [_star if piece[0] == "*" else _fixed(piece) for piece in _PIECE.findall(text)]


def _sequence(parts: Sequence[_Part]) -> _Part:
    def ends(name: str, starts: Collection[int]) -> Collection[int]:
        for part in parts:
            if not starts:
                break
            starts = part(name, starts)
        return starts

    return ends


def _star(name: str, starts: Collection[int]) -> Collection[int]:
    return range(min(starts), len(name) + 1)


def _fixed(text: str) -> _Part:
    """A text of one length: characters, `?` and sets."""
    if not _WILDCARD.search(text):
        return _literal(text)
    length = len(_SET.sub("?", text))
    match = re.compile(fnmatch.translate(text)).match
    return lambda name, starts: {at + length for at in starts if match(name, at, at + length)}


def _literal(text: str) -> _Part:
    def ends(name: str, starts: Collection[int]) -> Collection[int]:
        if not isinstance(starts, range):
            return [at + len(text) for at in starts if name.startswith(text, at)]
        found = []
        at = name.find(text, starts[0])
        while at >= 0:
            found.append(at + len(text))
            at = name.find(text, at + 1)
        return found

    return ends


def _group(words: Iterable[str]) -> tuple[_Part, int]:
    """Any of several words, and the number of tests that it takes at each place."""
    plain: dict[int, set[str]] = {}
    wild: list[_Part] = []
    tests = 0
    for word in words:
        if _WILDCARD.search(word):
            parts = _parts(word)
            tests += len(parts)
            wild.append(_sequence(parts))
        else:
            plain.setdefault(len(word), set()).add(word)

    def ends(name: str, starts: Collection[int]) -> Collection[int]:
        found = {
            at + length
            for length, some in plain.items()
            for at in starts
            if name[at : at + length] in some
        }
        return found.union(*(part(name, starts) for part in wild))

    return ends, tests + len(plain)


def nearest(name: str, candidates: Iterable[str], n: int = 3) -> list[str]:
    """Find the candidates that someone who typed `name` may have meant.

    Candidates that differ in their numbers only count as one, so a model of 90,000 layers is
    compared by its few dozen distinct shapes, and the answer never lists one layer in 30 copies.

    Args:
        name: what was typed: a layer name, a glob, or a key.
        candidates: what there is.
        n: how many to return at most.
    Returns:
        Candidates, best first; empty where nothing is close.
    """
    shapes: dict[str, list[str]] = {}
    for candidate in candidates:
        shapes.setdefault(without_numbers(candidate), []).append(candidate)
    wanted = _shape(name)
    scored = [(_likeness(wanted, shape), shape) for shape in shapes]
    best = sorted((pair for pair in scored if pair[0] >= 0.6), key=lambda pair: (-pair[0], pair[1]))
    found: list[str] = []
    for _, shape in best[:n]:
        found.append(_same_numbers(name, shapes[shape]))
    return found


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
    parts, has = bare.count(".") + 1, right.split(".")
    if bare and parts < len(has):
        window = ".".join(has[-parts:])
        ratio = max(ratio, 0.95 * difflib.SequenceMatcher(None, bare, window).ratio())
    return ratio


def _same_numbers(name: str, candidates: list[str]) -> str:
    numbers = _NUMBER.findall(name)
    for candidate in candidates:
        if _NUMBER.findall(candidate) == numbers:
            return candidate
    return candidates[0]
