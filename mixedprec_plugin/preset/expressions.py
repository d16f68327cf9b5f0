"""The interpolations that a text of a preset may hold: `${schemes.attention}`, `${oc.env:NAME}`.

OmegaConf resolves them. It is only given texts that hold these two forms: it would run any
resolver that some package has registered, and it recurses as deeply as a text nests.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any, TypeGuard

from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError

MAX_LENGTH = 10_000

_UNESCAPED = r"(?<!\\)((?:\\\\)*)"
_INNER = re.compile(r"\$\{[^${}]*\}")
# backslashes that stand for half of them, an interpolation, what is in it
EXPRESSION = re.compile(rf"{_UNESCAPED}(\$\{{((?:[^${{}}]|{_INNER.pattern})*)\}})")
_START = re.compile(rf"{_UNESCAPED}\$\{{")
_KEY = r"[A-Za-z0-9_-]+"
_REFERENCE = re.compile(rf" *(\.*)((?:{_KEY}|\[{_KEY}\])(?:\.{_KEY}|\[{_KEY}\])*) *")
_NESTED = "\0"
_VARIABLE = re.compile(
    r""" *(["']?)([A-Za-z_][A-Za-z0-9_.-]*)\1 *"""
    rf"""(?:,( *(?:[^\s,'"()\[\]\0][^,'"()\[\]\0]*|'[^'\0]*'|"[^"\0]*"|{_NESTED}) *))?"""
)


@dataclasses.dataclass(frozen=True)
class Reference:
    """`${schemes.attention}`; `dots` counts the dots of a relative one, `${.bits}`."""

    text: str
    keys: tuple[str, ...]
    dots: int


@dataclasses.dataclass(frozen=True)
class Variable:
    """`${oc.env:NAME}` or `${oc.env:NAME,DEFAULT}`; `nested` is an interpolation as default."""

    text: str
    name: str
    has_default: bool
    nested: Reference | Variable | None


class ExpressionError(ValueError):
    """A text that is no interpolation, or one that presets do not take."""

    def __init__(self, what: str, remedy: str = "", rule: str = "interpolation-syntax") -> None:
        plain = "write ${schemes.NAME} or ${oc.env:NAME}; for a plain '${' write '\\${'"
        super().__init__(what)
        self.remedy = remedy or plain
        self.rule = rule


def is_interpolated(value: Any) -> TypeGuard[str]:
    """Whether a value holds an interpolation, or one that is escaped."""
    return isinstance(value, str) and "${" in value


@functools.lru_cache(maxsize=4096)
def parse_text(text: str) -> tuple[tuple[Reference | Variable, ...], bool]:
    """Find the interpolations of a text that holds `${`.

    Returns:
        all of them, and whether the text is one interpolation and nothing else.
    Raises:
        ExpressionError: there is something else, such as a resolver other than `oc.env`.
    """
    shown = repr(text if len(text) < 100 else f"{text[:99]}…")
    if len(text) > MAX_LENGTH:
        what = f"{shown} has an interpolation and {len(text)} characters"
        raise ExpressionError(f"{what} (expected {MAX_LENGTH} at most)", "write less")
    if _START.search(EXPRESSION.sub("_", text)):
        what = f"{shown} is not an interpolation (expected '${{' and '}}' in pairs, at most one"
        raise ExpressionError(f"{what} pair within another)")
    parts = tuple(_parse(match[2], match[3]) for match in EXPRESSION.finditer(text))
    try:
        OmegaConf.create([text])
    except GrammarParseError as error:
        reason = str(error).splitlines()[0]
        raise ExpressionError(f"{shown} is not an interpolation: {reason}") from error
    whole = EXPRESSION.fullmatch(text)
    return parts, whole is not None and not whole[1]


def _parse(text: str, body: str) -> Reference | Variable:
    nested = [_parse(inner, inner[2:-1]) for inner in _INNER.findall(body)]
    flat = _INNER.sub(_NESTED, body)
    name, colon, arguments = flat.partition(":")
    if colon and name.strip() != "oc.env":
        what = f"the resolver {body.partition(':')[0]!r} in {text} is not allowed in presets"
        remedy = "only ${oc.env:NAME} and references such as ${schemes.NAME} are"
        raise ExpressionError(what, remedy, "resolver")
    if colon:
        variable = _VARIABLE.fullmatch(arguments)
        if variable is None:
            what = f"{text} does not name one environment variable"
            raise ExpressionError(what, "write ${oc.env:NAME} or ${oc.env:NAME,DEFAULT}")
        default = nested[0] if nested else None
        return Variable(text, variable[2], variable[3] is not None, default)
    if nested:
        what = f"{text} has an interpolation within its key"
        remedy = "write the key out; a rule's 'scheme' may be an interpolation itself"
        raise ExpressionError(what, remedy, "nested-interpolation")
    reference = _REFERENCE.fullmatch(flat)
    if reference is None:
        raise ExpressionError(f"{text} is not an interpolation (expected keys and dots)")
    return Reference(text, tuple(re.findall(_KEY, reference[2])), len(reference[1]))
