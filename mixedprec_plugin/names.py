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
import functools
import itertools
import re
import reprlib
from collections.abc import Callable, Iterable

import bracex

MAX_PATTERN_LENGTH = 4096
MAX_ALTERNATIVES = 10_000
MAX_DEPTH = 8
MAX_BACKTRACKING_STARS = 4

_RANGE = re.compile(r"([-+]?\d+|[A-Za-z])\.\.([-+]?\d+|[A-Za-z])(\.\.[-+]?\d+)?")
_NUMBER = re.compile(r"\d+")
_REGEX_HINTS = frozenset("\\^$()|+")

_shortened = reprlib.Repr()
_shortened.maxstring = 100


class PatternError(ValueError):
    """A glob that cannot be read; its text says what to write instead."""


def compile_pattern(pattern: str) -> Callable[[str], bool]:
    """Turn a glob into a test of one layer name.

    Args:
        pattern: the glob; see the module's docstring.
    Returns:
        A function of a whole layer name, true where the pattern matches.
    Raises:
        PatternError: the pattern is malformed, or expands to too many alternatives.
    """
    fullmatch = _compile(pattern).fullmatch
    return lambda name: fullmatch(name) is not None


@functools.lru_cache(maxsize=4096)
def _compile(pattern: str) -> re.Pattern[str]:
    if not pattern:
        raise PatternError("an empty pattern matches no layer; write '*' for all of them")
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise PatternError(
            f"a pattern of {len(pattern)} characters is too long (expected {MAX_PATTERN_LENGTH} "
            "at most); write several patterns"
        )
    if pattern.startswith("re:"):
        raise PatternError(f"{pattern!r} is a regular expression (expected a glob)")
    translator = _Translator(pattern)
    return re.compile(translator.translate(), re.DOTALL)


class _Translator:
    """Recursive descent over one glob; keeps braces as alternations, so that they never multiply.

    `*` followed by text of one fixed length is compiled to a possessive search: the first place
    where that text occurs serves as well as any later one. Only the rest can backtrack, and their
    number is limited.
    """

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.shown = _shortened.repr(pattern)
        self.at = 0
        self.alternatives = 0
        self.backtracking = 0

    def translate(self) -> str:
        parts, stops = self._sequence(depth=0)
        assert not stops
        segments = [
            list(segment)
            for is_star, segment in itertools.groupby(parts, key=lambda part: part is _STAR)
            if not is_star
        ]
        if not segments:
            return ".*"
        begins_with_star, ends_with_star = parts[0] is _STAR, parts[-1] is _STAR
        text = "" if begins_with_star else _join(segments.pop(0))
        tail = ""
        if not ends_with_star and segments:
            tail = ".*" + _join(segments.pop())
        for number, segment in enumerate(segments):
            text += self._search(segment, number)
        return text + (".*" if ends_with_star else tail)

    def _search(self, segment: list[_Part], number: int) -> str:
        body = _join(segment)
        if all(part.length is not None for part in segment):
            return f"(?=(?P<s{number}>.*?{body}))(?P=s{number})"
        self._count_star()
        return f".*?{body}"

    def _count_star(self) -> None:
        self.backtracking += 1
        if self.backtracking > MAX_BACKTRACKING_STARS:
            raise PatternError(
                f"{self.shown} has more than {MAX_BACKTRACKING_STARS} stars within or before "
                "braces; write several patterns"
            )

    def _sequence(self, depth: int) -> tuple[list[_Part], str]:
        """Read up to the end, or inside braces up to `,` or `}`, which is returned."""
        parts: list[_Part] = []
        while self.at < len(self.pattern):
            character = self.pattern[self.at]
            if depth and character in ",}":
                return parts, character
            self.at += 1
            if character == "*":
                if not parts or parts[-1] is not _STAR:
                    parts.append(_STAR)
            elif character == "?":
                parts.append(_Part(".", 1))
            elif character == "[":
                parts.append(self._set())
            elif character == "{":
                parts.append(self._braces(depth + 1))
            else:
                parts.append(self._literal(character))
        if depth:
            raise PatternError(f"{self.shown} opens a '{{' that nothing closes")
        return parts, ""

    def _literal(self, character: str) -> _Part:
        if character in "]}":
            raise PatternError(f"{self.shown} has a {character!r} that closes nothing")
        if character == ",":
            raise PatternError(
                f"{self.shown} has a ',' outside braces; write a list of patterns, or {{a,b}}"
            )
        if character in _REGEX_HINTS:
            raise PatternError(
                f"{self.shown} has {character!r}, which no layer name has; patterns are globs, "
                "not regular expressions: '*', '?', '[…]', '{a,b}', '{0..15}'"
            )
        if character.isspace() or not character.isprintable():
            raise PatternError(f"{self.shown} has {character!r}, which no layer name has")
        return _Part(re.escape(character), 1)

    def _set(self) -> _Part:
        end = self.pattern.find("]", self.at + 1)
        if end < 0:
            raise PatternError(f"{self.shown} opens a '[' that nothing closes")
        content = self.pattern[self.at : end]
        self.at = end + 1
        negated = content.startswith("!")
        members = content[1:] if negated else content
        if not members or any(character in "[]{},^\\!" for character in members):
            raise PatternError(
                f"'[{content}]' in {self.shown} is not a set of characters "
                "(expected '[abc]', '[a-z]' or '[!abc]'; for words write '{a,b}')"
            )
        text, at = "", 0
        while at < len(members):
            if members[at + 1 : at + 2] == "-" and at + 2 < len(members):
                first, last = members[at], members[at + 2]
                if first > last:
                    raise PatternError(
                        f"'[{content}]' in {self.shown} counts backwards; write '{last}-{first}'"
                    )
                text += f"{re.escape(first)}-{re.escape(last)}"
                at += 3
            else:
                text += re.escape(members[at])
                at += 1
        return _Part(f"[{'^' if negated else ''}{text}]", 1)

    def _braces(self, depth: int) -> _Part:
        if depth > MAX_DEPTH:
            raise PatternError(
                f"{self.shown} nests braces more than {MAX_DEPTH} deep; write several patterns"
            )
        end = self.pattern.find("}", self.at)
        content = self.pattern[self.at : end] if end >= 0 else ""
        if _RANGE.fullmatch(content):
            self.at = end + 1
            return self._range(content)
        if ".." in content and not any(character in "{," for character in content):
            raise PatternError(
                f"'{{{content}}}' in {self.shown} is not a range (expected '{{0..15}}')"
            )
        return self._choice(depth)

    def _choice(self, depth: int) -> _Part:
        start = self.at - 1
        choices: list[_Part] = []
        stop = ","
        while stop == ",":
            begin = self.at
            parts, stop = self._sequence(depth)
            if _RANGE.fullmatch(word := self.pattern[begin : self.at]):
                raise PatternError(
                    f"'{word}' in {self.shown} is no range beside a ',' "
                    f"(expected '{{{word}}}' there)"
                )
            for _ in range(sum(part is _STAR for part in parts)):
                self._count_star()
            self._count_alternatives(1)
            lengths = [part.length for part in parts]
            length = None if None in lengths else sum(n for n in lengths if n is not None)
            choices.append(_Part(_join(parts), length))
            self.at += 1
        if len(choices) < 2:
            text = self.pattern[start : self.at]
            raise PatternError(
                f"{text!r} in {self.shown} leaves nothing to choose "
                "(expected '{a,b}' or '{0..15}'); leave the braces out"
            )
        fixed = {choice.length for choice in choices}
        return _Part(
            f"(?:{'|'.join(choice.text for choice in choices)})",
            fixed.pop() if len(fixed) == 1 else None,
        )

    def _range(self, content: str) -> _Part:
        try:
            words = bracex.expand(f"{{{content}}}", limit=MAX_ALTERNATIVES)
        except bracex.ExpansionLimitException:
            self._count_alternatives(MAX_ALTERNATIVES + 1)
            raise
        if words == [f"{{{content}}}"]:
            raise PatternError(
                f"'{{{content}}}' in {self.shown} is not a range (expected '{{0..15}}')"
            )
        self._count_alternatives(len(words))
        lengths = {len(word) for word in words}
        text = "|".join(re.escape(word) for word in words)
        return _Part(f"(?:{text})", lengths.pop() if len(lengths) == 1 else None)

    def _count_alternatives(self, count: int) -> None:
        self.alternatives += count
        if self.alternatives > MAX_ALTERNATIVES:
            raise PatternError(
                f"the braces of {self.shown} list more than {MAX_ALTERNATIVES} alternatives; "
                "use '*' or a shorter range"
            )


class _Part:
    """A piece of regular expression, and how many characters it takes where that is fixed."""

    __slots__ = ("length", "text")

    def __init__(self, text: str, length: int | None) -> None:
        self.text = text
        self.length = length


_STAR = _Part(".*?", None)


def _join(parts: Iterable[_Part]) -> str:
    return "".join(part.text for part in parts)


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
