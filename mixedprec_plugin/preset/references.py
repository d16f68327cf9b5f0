"""What a text with interpolations refers to, read off OmegaConf's own parse tree."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from omegaconf.errors import GrammarParseError
from omegaconf.grammar_parser import parse


@dataclasses.dataclass(frozen=True)
class Reference:
    """`${schemes.attention}`; `dots` counts the dots of a relative one, `${.bits}`."""

    text: str
    keys: tuple[str, ...]
    dots: int


@dataclasses.dataclass(frozen=True)
class Environment:
    """`${oc.env:NAME}` or `${oc.env:NAME,DEFAULT}`."""

    name: str
    has_default: bool


@dataclasses.dataclass(frozen=True)
class Expression:
    """Everything that a text refers to; `is_whole` if it is one interpolation and nothing else."""

    parts: tuple[Reference | Environment, ...]
    is_whole: bool


class ExpressionError(ValueError):
    """A text that is no interpolation, or one that presets do not take."""

    def __init__(self, what: str, remedy: str, rule: str) -> None:
        super().__init__(what)
        self.remedy = remedy
        self.rule = rule


@functools.lru_cache(maxsize=4096)
def parse_expression(text: str) -> Expression:
    """Parse a text that holds `${`.

    Raises:
        ExpressionError: it cannot be parsed, or uses a resolver other than `oc.env`.
    """
    try:
        tree: Any = parse(text)
    except GrammarParseError as error:
        what = f"{text!r} is not an interpolation: {str(error).splitlines()[0]}"
        remedy = "write ${schemes.NAME} or ${oc.env:NAME}; for a plain '${' write '\\${'"
        raise ExpressionError(what, remedy, "interpolation-syntax") from error
    body = tree.getChild(0)
    parts: list[Reference | Environment] = []
    _walk(body, parts)
    is_whole = body.getChildCount() == 1 and _kind(body.getChild(0)) == "Interpolation"
    return Expression(tuple(parts), is_whole)


def _walk(tree: Any, parts: list[Reference | Environment]) -> None:
    kind = _kind(tree)
    if kind == "InterpolationNode":
        parts.append(_reference(tree))
    elif kind == "InterpolationResolver":
        parts.append(_environment(tree))
        for element in _elements(tree)[1:]:
            _walk(element, parts)
    else:
        for child in _children(tree):
            _walk(child, parts)


def _reference(tree: Any) -> Reference:
    keys: list[str] = []
    dots = 0
    for child in _children(tree):
        if _kind(child) == "ConfigKey":
            if any(_kind(part) == "Interpolation" for part in _children(child)):
                _refuse_resolvers(child)
                what = f"{tree.getText()} has an interpolation within its key"
                remedy = "write the key out; a rule's 'scheme' may be an interpolation itself"
                raise ExpressionError(what, remedy, "nested-interpolation")
            keys.append(child.getText())
        elif child.getText() == "." and not keys:
            dots += 1
    return Reference(tree.getText(), tuple(keys), dots)


def _environment(tree: Any) -> Environment:
    name = tree.getChild(1).getText()
    if name != "oc.env":
        what = f"the resolver {name!r} in {tree.getText()} is not allowed in presets"
        remedy = "only ${oc.env:NAME} and references such as ${schemes.NAME} are"
        raise ExpressionError(what, remedy, "resolver")
    elements = _elements(tree)
    variable = elements[0].getText().strip("\"'") if elements else ""
    if not variable or len(elements) > 2 or "${" in variable:
        for element in elements:
            _refuse_resolvers(element)
        what = f"{tree.getText()} does not name one environment variable"
        remedy = "write ${oc.env:NAME} or ${oc.env:NAME,DEFAULT}"
        raise ExpressionError(what, remedy, "interpolation-syntax")
    return Environment(variable, len(elements) == 2)


def _refuse_resolvers(tree: Any) -> None:
    if _kind(tree) == "InterpolationResolver":
        _environment(tree)
    for child in _children(tree):
        _refuse_resolvers(child)


def _elements(tree: Any) -> list[Any]:
    for child in _children(tree):
        if _kind(child) == "Sequence":
            return [element for element in _children(child) if _kind(element) == "Element"]
    return []


def _children(tree: Any) -> list[Any]:
    count = tree.getChildCount() if hasattr(tree, "getChildCount") else 0
    return [tree.getChild(index) for index in range(count)]


def _kind(tree: Any) -> str:
    return type(tree).__name__.removesuffix("Context")
