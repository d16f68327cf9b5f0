"""Function parameters as they stand in a source, and whether a call fits them."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable

from compat.definitions import Definition, Function, members
from compat.sources import Sources

_Kind = inspect._ParameterKind


def kind(node: Function) -> str:
    """`staticmethod`, `classmethod`, `property` or `method`."""
    names = {ast.unparse(decorator) for decorator in node.decorator_list}
    return next((n for n in ("staticmethod", "classmethod", "property") if n in names), "method")


def signature(node: Function, is_bound: bool = False) -> inspect.Signature:
    """A function's signature.

    Args:
        node: the function.
        is_bound: it is a method that is called on an instance or class; `self` is left out.
    """
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    first_default = len(positional) - len(arguments.defaults)
    found = [
        _parameter(
            argument,
            _Kind.POSITIONAL_ONLY
            if index < len(arguments.posonlyargs)
            else _Kind.POSITIONAL_OR_KEYWORD,
            index >= first_default,
        )
        for index, argument in enumerate(positional)
    ]
    if arguments.vararg:
        found.append(_parameter(arguments.vararg, _Kind.VAR_POSITIONAL))
    found += [
        _parameter(argument, _Kind.KEYWORD_ONLY, default is not None)
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    if arguments.kwarg:
        found.append(_parameter(arguments.kwarg, _Kind.VAR_KEYWORD))
    if is_bound and kind(node) != "staticmethod":
        found = found[1:]
    return inspect.Signature(found)


def _parameter(node: ast.arg, kind: _Kind, has_default: bool = False) -> inspect.Parameter:
    default = ... if has_default else inspect.Parameter.empty
    return inspect.Parameter(node.arg, kind, default=default)


def call_signature(sources: Sources, called: Definition) -> inspect.Signature | None:
    """The signature of a function, or of a class's constructor; None if it cannot be told."""
    if isinstance(called.node, Function):
        return signature(called.node)
    if not called.is_class:
        return None
    found = members(sources, called)
    constructor = found.get("__init__")
    if constructor and isinstance(constructor.node, Function):
        return signature(constructor.node, is_bound=True)
    return None


def misfit(wanted: inspect.Signature, num_positional: int, keywords: Iterable[str]) -> str:
    """Why a call does not fit; empty if it does."""
    names = [name for name, p in wanted.parameters.items() if not _is_variadic(p)]
    takes_any = any(p.kind is _Kind.VAR_KEYWORD for p in wanted.parameters.values())
    keywords = list(keywords)
    unknown = [name for name in keywords if name not in names and not takes_any]
    if unknown:
        return f"does not take {', '.join(unknown)} (takes {', '.join(names) or 'nothing'})"
    try:
        wanted.bind(*[...] * num_positional, **dict.fromkeys(keywords, ...))
    except TypeError as error:
        return f"{error} (takes {', '.join(names) or 'nothing'})"
    return ""


def rejected(ours: inspect.Signature, theirs: inspect.Signature) -> list[str]:
    """Parameters of theirs that ours does not take, when ours stands in for theirs.

    Both without `self`. Names count: callers may pass any of them by keyword.
    """
    if any(p.kind is _Kind.VAR_KEYWORD for p in ours.parameters.values()):
        return []
    return [
        name
        for name, parameter in theirs.parameters.items()
        if not _is_variadic(parameter) and name not in ours.parameters
    ]


def _is_variadic(parameter: inspect.Parameter) -> bool:
    return parameter.kind in (_Kind.VAR_POSITIONAL, _Kind.VAR_KEYWORD)
