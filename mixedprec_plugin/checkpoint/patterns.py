"""Regular expressions of a config.json, held against layer names in bounded time.

Python's `re` tries one way after another, of which a few characters can make more than there are
seconds. Where a pattern may, all ways are followed at once instead, character by character
(K. Thompson, "Regular expression search algorithm", 1968): `re` only parses, and tests characters.
"""

from __future__ import annotations

import functools
import re
import sys
from typing import Any, NamedTuple

from mixedprec_plugin.errors import CheckpointError, Problem

if sys.version_info >= (3, 11):
    from re import _compiler, _parser  # type: ignore[attr-defined]
else:
    import sre_compile as _compiler
    import sre_parse as _parser

_MAX_LENGTH = 1 << 14
_MAX_STEPS = 2048
# one more turn than the longest name has characters changes nothing
_MAX_TURNS = 1025
# at most two repetitions, none of a group: no more ways than the square of a name's length
_REPETITION = re.compile(r"[*+?{]")
_REPEATED_GROUP = re.compile(r"\)[*+?{]")


# a dot still stands for any character
_PLAIN = re.compile(r"[^*+?{}()\[\]\\|^$]*")
MAX_PATTERNS = 2048


class _Step(NamedTuple):
    """One step of a pattern.

    Attributes:
        nexts: the steps that follow it; none after the last.
        test: what is asked at a place in the name; None where nothing is.
        width: how many characters it takes.
    """

    nexts: tuple[int, ...]
    test: Any = None
    width: int = 0


def matches(pattern: str, name: str, *, whole: bool = False) -> bool:
    """Match a pattern of config.json as the tools do: from the start of a name, or all of it.

    Raises:
        CheckpointError: it is no regular expression, or none that is matched in bounded time.
    """
    if is_plain(pattern):
        part = name if whole else name[: len(pattern)]
        is_long = len(part) == len(pattern)
        return is_long and all(p in (c, ".") for p, c in zip(pattern, part, strict=True))
    read = _read(pattern)
    if isinstance(read, re.Pattern):
        return (read.fullmatch if whole else read.match)(name) is not None
    return _follow(read, name, 0, {}, whole=whole)


def is_plain(pattern: str) -> bool:
    """Whether a pattern has no wildcard but the dot."""
    return _PLAIN.fullmatch(pattern) is not None


@functools.lru_cache(maxsize=MAX_PATTERNS)
def _read(pattern: str) -> re.Pattern[str] | tuple[_Step, ...]:
    """A pattern for `re`, where that is fast, or its steps."""
    try:
        if len(pattern) > _MAX_LENGTH:
            raise re.error(f"longer than {_MAX_LENGTH} characters")
        compiled = re.compile(pattern)
        repetitions, groups = len(_REPETITION.findall(pattern)), pattern.count("(")
        if repetitions <= 2 and groups <= 1 and not _REPEATED_GROUP.search(pattern):
            return compiled
        parsed = _parser.parse(pattern)
        steps: list[_Step] = []
        _lay_out(parsed, parsed.state, steps)
        return (*steps, _Step(()))
    except (re.error, RecursionError, OverflowError) as error:
        what = f"{pattern!r:.200} is not a regular expression that can be followed ({error})"
        where = "config.json: quantization_config"
        problem = Problem(where, what, "correct the pattern", "config-pattern")
        raise CheckpointError(problem) from error


def _lay_out(parsed: Any, state: Any, steps: list[_Step]) -> None:
    """Append the steps of a parsed pattern; they lead to what is appended next."""
    for op, value in parsed:
        kind, start = str(op), len(steps)
        if start > _MAX_STEPS:
            raise re.error(f"more than {_MAX_STEPS} steps")
        if kind == "SUBPATTERN" and not value[1] and not value[2]:
            _lay_out(value[3], state, steps)
        elif kind == "BRANCH":
            steps.append(_Step(()))
            starts, ends = [], []
            for branch in value[1]:
                starts.append(len(steps))
                _lay_out(branch, state, steps)
                ends.append(len(steps))
                steps.append(_Step(()))
            steps[start] = _Step(tuple(starts))
            for end in ends:
                steps[end] = _Step((len(steps),))
        elif kind in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, item = value
            _repeat(int(least), int(most), item, state, steps)
        elif kind in ("ASSERT", "ASSERT_NOT"):
            inner: list[_Step] = []
            _lay_out(value[1], state, inner)
            back = value[1].getwidth()[0] if value[0] < 0 else 0
            look = (kind == "ASSERT", back, (*inner, _Step(())))
            steps.append(_Step((start + 1,), look))
        elif kind in ("AT", "LITERAL", "NOT_LITERAL", "ANY", "IN"):
            test = _compiler.compile(_parser.SubPattern(state, [(op, value)]))
            steps.append(_Step((start + 1,), test, 0 if kind == "AT" else 1))
        else:
            raise re.error(f"{kind.lower()} beside repetitions")


def _repeat(least: int, most: int, item: Any, state: Any, steps: list[_Step]) -> None:
    """Append a repetition: turns that are taken, then turns after any of which it may end."""
    least = min(least, _MAX_TURNS)
    for _ in range(least):
        _lay_out(item, state, steps)
    if most > _MAX_TURNS:
        start = len(steps)
        steps.append(_Step(()))
        _lay_out(item, state, steps)
        steps.append(_Step((start,)))
        steps[start] = _Step((start + 1, len(steps)))
        return
    ways_out = []
    for _ in range(most - least):
        ways_out.append(len(steps))
        steps.append(_Step(()))
        _lay_out(item, state, steps)
    for start in ways_out:
        steps[start] = _Step((start + 1, len(steps)))


def _follow(
    steps: tuple[_Step, ...], name: str, at: int, seen: dict[object, bool], *, whole: bool = False
) -> bool:
    """Whether some way through the steps, from a place in a name, comes to the last of them."""
    waiting, last = {0}, len(steps) - 1
    while waiting:
        reached, found = list(waiting), waiting
        for number in reached:
            step = steps[number]
            if step.width == 0 and _holds(step.test, name, at, seen):
                fresh = [other for other in step.nexts if other not in found]
                found.update(fresh)
                reached += fresh
        if last in found and (at == len(name) or not whole):
            return True
        waiting = {
            steps[number].nexts[0]
            for number in found
            if steps[number].width and steps[number].test.match(name, at)
        }
        at += 1
    return False


def _holds(test: Any, name: str, at: int, seen: dict[object, bool]) -> bool:
    if not isinstance(test, tuple):
        return test is None or test.match(name, at) is not None
    wanted, back, inner = test
    key = id(inner), at
    if key not in seen:
        seen[key] = at >= back and _follow(inner, name, at - back, seen)
    return bool(seen[key] == wanted)
