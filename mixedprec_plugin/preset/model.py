"""A preset as the rest of the package sees it: frozen, complete, checked."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from mixedprec_plugin.checkpoint.recorded import digest_of
from mixedprec_plugin.errors import MixedPrecisionError, Problem


@dataclasses.dataclass(frozen=True)
class Location:
    """Where in a YAML file something stands; prints as `qwen3.yaml:14: rules[2].group_size`."""

    file: str
    line: int
    key: str = ""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place}: {self.key}" if self.key else place


@dataclasses.dataclass(frozen=True)
class SourceReference:
    """A named checkpoint that layers are taken from.

    Attributes:
        path: a folder, one beside the preset that names it made whole, or a Hugging Face id.
        revision: branch, tag or commit of a Hugging Face id.
        shown_path, shown_revision: the same with the names of environment variables in place of
            their values, which neither messages nor files may hold.
    """

    name: str
    path: str
    revision: str | None
    location: Location
    shown_path: str
    shown_revision: str | None

    def conceal(self, text: str) -> str:
        """Write the names of environment variables in place of their values."""
        if self.path != self.shown_path:
            path = Path(self.path).expanduser()
            # the last is how the Hub's cache spells an id
            spellings = {*map(str, (self.path, path, path.resolve())), self.path.replace("/", "--")}
            for spelling in sorted(spellings, key=len, reverse=True):
                text = text.replace(spelling, self.shown_path)
        if self.revision and self.revision != self.shown_revision:
            text = text.replace(self.revision, self.shown_revision or "")
        return text


# arguments that say how we read and quantize, and that no SGLang config knows
_OURS = frozenset({"rounding", "dtype"})


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A method with its arguments bound, defaults filled in.

    Attributes:
        label: the key under `schemes:`, or for an inline scheme the method as it was typed.
        method: canonical registry key.
        source: name of the source the layers are taken from.
        requantize: whether a layer that is stored in another quantized format may be dequantized
            and quantized again.
    """

    label: str
    method: str
    arguments: Mapping[str, Any]
    source: str = "model"
    requantize: bool = False

    @functools.cached_property
    def identity(self) -> tuple[str, tuple[tuple[str, str], ...]]:
        """What decides whether two schemes are the same for SGLang; the rest is not."""
        return self.method, tuple(
            sorted((k, repr(v)) for k, v in self.arguments.items() if k not in _OURS)
        )

    @property
    def summary(self) -> str:
        """Method and what it was told, in few words: `gptq 4-bit g128`, `fp8 128x128`."""
        words = [self.method]
        for name, value in self.arguments.items():
            match name, value:
                case "bits", _:
                    words.append(f"{value}-bit")
                case "group_size", _:
                    words.append(f"g{value}")
                case "weight_block_size", [rows, columns]:
                    words.append(f"{rows}x{columns}")
                case "activation_scheme", "static":
                    words.append("static")
                case "dtype", "float16":
                    words.append(value)
                case "desc_act", True:
                    words.append("act-order")
        return " ".join(words)


@dataclasses.dataclass(frozen=True)
class Rule:
    """Patterns and the scheme of the layers that they match.

    Attributes:
        index: position in the merged list of rules, from 0.
        patterns: globs over layer names; the rule matches where any does.
        location: the rule's own line, in the file that it was written in.
        shown: the patterns with the names of environment variables in place of their values.
    """

    index: int
    patterns: tuple[str, ...]
    scheme: Scheme
    optional: bool
    location: Location
    shown: tuple[str, ...]

    def __str__(self) -> str:
        return f"rule {self.index}, {', '.join(repr(p) for p in self.shown)}"


@dataclasses.dataclass(frozen=True)
class KvCache:
    """What a preset says of the KV cache.

    Attributes:
        dtype: of the cache, as --kv-cache-dtype takes it; `auto` leaves it to that option.
        scales: name of the source that its scales come from; empty for none at all, None where they
            stay with the layers that hold them.
        calibrates: whether a conversion computes them from text instead.
    """

    dtype: str = "auto"
    scales: str | None = None
    calibrates: bool = False


@dataclasses.dataclass(frozen=True)
class Preset:
    """One preset with its parents merged in.

    Attributes:
        path: the file that was asked for.
        files: every file that was read, parents first.
        untie_lm_head: whether an `lm_head` that shares the embedding's weight becomes a matrix of
            its own, for rules to quantize.
        resolved: the merged mapping, interpolations resolved, as plain data: loading it again as a
            preset of its own gives the same plan.
        warnings: what is odd but no error, such as a scheme that no rule uses.
        draft: the section `draft`, for the draft model of speculative decoding; None without one.
    """

    path: str
    files: tuple[str, ...]
    description: str
    sources: Mapping[str, SourceReference]
    rules: tuple[Rule, ...]
    on_fused_conflict: Literal["error", "highest"]
    trust_sources: bool
    untie_lm_head: bool
    kv_cache: KvCache
    resolved: Mapping[str, Any]
    warnings: tuple[Problem, ...] = ()
    draft: Preset | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of `resolved`: the same for presets that say the same, whatever their files."""
        return digest_of(self.resolved)

    def conceal(self, problem: Problem) -> Problem:
        """A problem of the sources with the names of environment variables for their values."""
        for source in self.sources.values():
            where, what, remedy = map(source.conceal, (problem.where, problem.what, problem.remedy))
            problem = dataclasses.replace(problem, where=where, what=what, remedy=remedy)
        return problem

    @contextlib.contextmanager
    def concealing(self) -> Iterator[None]:
        """Do so with whatever error is raised."""
        try:
            yield
        except MixedPrecisionError as error:
            # what it came of may hold them, too
            raise type(error)(map(self.conceal, error.problems)) from None
