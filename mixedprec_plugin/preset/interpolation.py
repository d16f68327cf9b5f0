"""Interpolations in text, `${schemes.attention}` and `${oc.env:NAME}`: these two forms alone."""

from __future__ import annotations

import functools
import re
from typing import Any, NamedTuple, TypeGuard

from mixedprec_plugin.preset.document import Document, Path, RefusedError, Scalar, rewrite

MAX_LENGTH = 10_000

_REMEDY = "write ${schemes.NAME} or ${oc.env:NAME}; for a plain '${' write '\\${'"
_SYNTAX = "interpolation-syntax"

_UNESCAPED = r"(?<!\\)((?:\\\\)*)"
_INNER = re.compile(r"\$\{[^${}]*\}")
# backslashes that stand for half of them, an interpolation, what is in it
EXPRESSION = re.compile(rf"{_UNESCAPED}(\$\{{((?:[^${{}}]|{_INNER.pattern})*)\}})")
_KEY = r"[A-Za-z0-9_-]+"
_REFERENCE = re.compile(rf" *(\.*)((?:{_KEY}|\[{_KEY}\])(?:\.{_KEY}|\[{_KEY}\])*) *")
_DEFAULT = r"""[^\s,'"()\[\]\0][^,'"()\[\]\0]*|'[^'\0]*'|"[^"\0]*"|\0"""
_VARIABLE = re.compile(rf""" *(["']?)([A-Za-z_][A-Za-z0-9_.-]*)\1 *(?:,( *(?:{_DEFAULT}) *))?""")


class Reference(NamedTuple):
    """`${schemes.attention}`; `dots` counts the dots of a relative one, `${.bits}`."""

    text: str
    keys: tuple[str, ...]
    dots: int


class Variable(NamedTuple):
    """`${oc.env:NAME}` or `${oc.env:NAME,DEFAULT}`; `nested` is an interpolation as default."""

    text: str
    name: str
    has_default: bool
    nested: Reference | Variable | None = None


def is_interpolated(value: Any) -> TypeGuard[str]:
    """Whether a value holds an interpolation, or one that is escaped."""
    return isinstance(value, str) and "${" in value


@functools.lru_cache(maxsize=4096)
def check_text(text: str) -> tuple[tuple[Reference | Variable, ...], bool]:
    """Find the interpolations of a text.

    Returns:
        all of them, and whether the text is one interpolation and nothing else.
    Raises:
        RefusedError: there is something else, such as a resolver other than `oc.env`.
    """
    shown = repr(text if len(text) < 100 else f"{text[:99]}…")
    if len(text) > MAX_LENGTH:
        what = f"{shown} has an interpolation and {len(text)} characters"
        raise RefusedError(f"{what} (expected {MAX_LENGTH} at most)", "write less", _SYNTAX)
    if re.search(_UNESCAPED + r"\$\{", EXPRESSION.sub("_", text)):
        expected = "'${' and '}' in pairs, at most one pair within another"
        what = f"{shown} is not an interpolation (expected {expected})"
        raise RefusedError(what, _REMEDY, _SYNTAX)
    parts = tuple(part_of(match[2], match[3]) for match in EXPRESSION.finditer(text))
    # most presets have none, and its import takes a tenth of a plan's time
    from omegaconf import OmegaConf
    from omegaconf.errors import GrammarParseError

    try:
        OmegaConf.create([text])
    except GrammarParseError as error:
        what = f"{shown} is not an interpolation: {str(error).splitlines()[0]}"
        raise RefusedError(what, _REMEDY, _SYNTAX) from error
    whole = EXPRESSION.fullmatch(text)
    return parts, whole is not None and not whole[1]


def part_of(text: str, body: str) -> Reference | Variable:
    """Read one interpolation: its text, and what stands between the braces."""
    nested = [part_of(inner, inner[2:-1]) for inner in _INNER.findall(body)]
    flat = _INNER.sub("\0", body)
    name, colon, arguments = flat.partition(":")
    if colon and name.strip() != "oc.env":
        what = f"the resolver {body.partition(':')[0]!r} in {text} is not allowed in presets"
        remedy = "only ${oc.env:NAME} and references such as ${schemes.NAME} are"
        raise RefusedError(what, remedy, "resolver")
    if colon:
        variable = _VARIABLE.fullmatch(arguments)
        if variable is None:
            what = f"{text} does not name one environment variable"
            raise RefusedError(what, "write ${oc.env:NAME} or ${oc.env:NAME,DEFAULT}", _SYNTAX)
        return Variable(text, variable[2], variable[3] is not None, *nested)
    if nested:
        what = f"{text} has an interpolation within its key"
        remedy = "write the key out; a rule's 'scheme' may be an interpolation itself"
        raise RefusedError(what, remedy, "nested-interpolation")
    reference = _REFERENCE.fullmatch(flat)
    if reference is None:
        what = f"{text} is not an interpolation (expected keys and dots)"
        raise RefusedError(what, _REMEDY, _SYNTAX)
    return Reference(text, tuple(re.findall(_KEY, reference[2])), len(reference[1]))


def escape(data: Any) -> Any:
    """Write text so that resolving it gives it back: `${` in it is no interpolation."""

    def escaped(_path: Path, value: Scalar) -> Scalar:
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value

    return rewrite(data, escaped)


def refuse_environment(document: Document) -> None:
    """Refuse every text that reads an environment variable: the preset may be anybody's."""
    for path, text in document.parts():
        parts = check_text(text)[0] if is_interpolated(text) else ()
        if variable := next((part for part in parts if isinstance(part, Variable)), None):
            what = f"{variable.text} reads the environment, which a checkpoint's own preset may not"
            document.report(path, what, "name a preset of your own", "environment")
