"""The glob that was meant, where one matches no layer: tried, so that it matches some."""

from __future__ import annotations

import difflib
import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from mixedprec_plugin.families.names import Shard, shard_order
from mixedprec_plugin.names import PatternError, compile_pattern, without_numbers

_COMPONENT = re.compile(r"(?:\{[^{}]*\}|[^.{}])+")
_INTEGER = r"-?\d+"
_NUMBERS = re.compile(
    rf"{_INTEGER}|\{{{_INTEGER}\.\.{_INTEGER}(?:\.\.\d+)?\}}|\{{{_INTEGER}(?:,{_INTEGER})+\}}"
)
_WILD = re.compile(r"[*?\[{]")
# of names that differ in more than numbers, and of rules: beyond it nothing is tried
_MAX_SHAPES = 2000
_MAX_ANSWERS = 50


class NearGlobs:
    """Says what to write in place of a glob that matches no layer.

    Args:
        fused: layer name -> the module that SGLang runs it in, by the checkpoint's names, and the
            shard of the module that it is.
    """

    def __init__(self, fused: Mapping[str, tuple[str, Shard]]) -> None:
        self._fused = fused
        self._num_answers = 0

    def remedy(self, pattern: str) -> str:
        """What the writer can do about a glob that matches nothing; empty if that is not known."""
        self._num_answers += 1
        parts = _COMPONENT.findall(pattern)
        is_too_much = self._num_answers > _MAX_ANSWERS or len(self._shapes) > _MAX_SHAPES
        # braces within braces, or dots in a row
        if is_too_much or not parts or ".".join(parts) != pattern:
            return ""
        if self._fits(parts):
            return self._numbers_there_are(parts)
        if remedy := self._of_fused(parts):
            return remedy
        found = next(filter(self._fits, filter(_is_narrow, self._variants(parts))), None)
        if found is not None:
            return f"did you mean {'.'.join(found)!r}?"
        unknown = [x for x in parts if not _WILD.search(x) and _folded(x) not in self._words]
        return f"no layer's name has {unknown[0]!r} between its dots" if unknown else ""

    @functools.cached_property
    def _shapes(self) -> dict[str, str]:
        """Every layer name with '#' for its numbers -> the same of its module; shards in order."""
        in_order = sorted(self._fused.items(), key=lambda item: shard_order(item[1][1]))
        return {without_numbers(name): without_numbers(module) for name, (module, _) in in_order}

    @functools.cached_property
    def _words(self) -> list[str]:
        return sorted({word for shape in self._shapes for word in shape.split(".")})

    def _fits(self, parts: Sequence[str]) -> bool:
        """Whether a glob matches a layer, were it not for its numbers."""
        return any(map(_matcher(parts), self._shapes))

    def _numbers_there_are(self, parts: Sequence[str]) -> str:
        """Which numbers the model has in place of those that it has not."""
        for word, numbers in itertools.pairwise(parts):
            if _NUMBERS.fullmatch(numbers) and not _WILD.search(word):
                place = re.compile(rf"(?<![^.]){re.escape(word)}\.(\d+)(?![^.])")
                there = {int(x) for name in self._fused for x in place.findall(name)}
                if there and not any(map(compile_pattern(numbers), map(str, there))):
                    return f"the model has {word}.{min(there)} to {word}.{max(there)}"
        return ""

    def _of_fused(self, parts: Sequence[str]) -> str:
        """The parts of a module that SGLang runs and the checkpoint does not name."""
        matches = _matcher(parts)
        found = {shape: module for shape, module in self._shapes.items() if matches(module)}
        names = list(dict.fromkeys(shape.rpartition(".")[2] for shape in found))
        if len(names) < 2:
            return ""
        suffix = "_proj" if all(name.endswith("_proj") for name in names) else ""
        braces = f"{{{','.join(name.removesuffix(suffix) for name in names)}}}{suffix}"
        meant = [*parts[:-1], braces]
        if not self._fits(meant):
            return ""
        listed = f"{', '.join(names[:-1])} and {names[-1]}"
        return f"the checkpoint stores {parts[-1]} as {listed}: write {'.'.join(meant)!r}"

    def _variants(self, parts: Sequence[str]) -> Iterator[list[str]]:
        yield [*parts, "*"]
        for index, part in enumerate(parts):
            if not _WILD.search(part):
                for word in difflib.get_close_matches(part.lower(), self._words, cutoff=0.6):
                    yield [*parts[:index], word, *parts[index + 1 :]]
        for start in self._starts(_folded(parts[0])):
            yield [*start, *parts]
            yield [*start, *parts, "*"]
        for dropped in range(1, min(3, len(parts))):
            yield list(parts[dropped:])
        for index, part in enumerate(parts):
            if not _WILD.search(part):
                others = ([*parts[:index], word, *parts[index + 1 :]] for word in self._words)
                if len(fitting := list(filter(self._fits, others))) == 1:
                    yield fitting[0]

    def _starts(self, word: str) -> list[list[str]]:
        """What stands before a word in the names."""
        found: dict[tuple[str, ...], None] = {}
        for shape in self._shapes:
            words = shape.replace("#", "*").split(".")
            if word in words[1:]:
                found[tuple(words[: words.index(word, 1)])] = None
        return [list(start) for start in found]


def _matcher(parts: Sequence[str]) -> Callable[[str], bool]:
    try:
        return compile_pattern(".".join(map(_folded, parts)))
    except PatternError:  # what was put together is none
        return lambda _: False


def _is_narrow(parts: Sequence[str]) -> bool:
    """Whether a glob does not match everything, nor a shape in place of a name."""
    return "#" not in ".".join(parts) and any(re.search(r"\w", part) for part in parts)


def _folded(part: str) -> str:
    if _NUMBERS.fullmatch(part):
        return "#"
    return part if _WILD.search(part) else without_numbers(part)
