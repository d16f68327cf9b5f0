"""Which line of ours to look at when SGLang has changed under it."""

from __future__ import annotations

import ast
import inspect
import pkgutil
from collections.abc import Callable
from pathlib import Path
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any

import mixedprec_plugin

if TYPE_CHECKING:
    from mixedprec_plugin.methods.interface import Method
    from mixedprec_plugin.serving.hooks import Hook

_PACKAGE = Path(mixedprec_plugin.__file__).parent


def line_of(function: Callable[..., Any]) -> str:
    """Return `mixedprec_plugin/methods/fp8.py:14`, where a function begins."""
    code = inspect.unwrap(function).__code__
    assert isinstance(code, CodeType)
    return _place(Path(code.co_filename), code.co_firstlineno)


def line_of_text(module: ModuleType, text: str) -> str:
    """Return where a module spells a string, however it is cut into literals; or its first line."""
    path = Path(str(module.__file__))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and node.value == text:
            return _place(path, node.lineno)
    return _place(path, 1)


def line_of_failure(error: BaseException) -> str:
    """Return the last line of ours that an exception passed; empty if it passed none."""
    found = ""
    traceback = error.__traceback__
    while traceback is not None:
        path = Path(traceback.tb_frame.f_code.co_filename)
        # this package's own entrance says nothing about who was let down
        if path.is_relative_to(_PACKAGE) and not path.is_relative_to(_PACKAGE / "cli"):
            found = _place(path, traceback.tb_lineno)
        traceback = traceback.tb_next
    return found


def line_of_method(spec: Method, key: str, rule: str, error: BaseException) -> str:
    """Return the line of ours that a config which does not construct goes back to.

    Args:
        key: of `config_classes`.
        rule: of the problem: `no-config-class` goes back to where the class is named, the rest to
            the builder of the arguments.
        error: what was raised; an import that failed within our own class comes first.
    """
    module = inspect.getmodule(spec.config_arguments)
    if rule != "no-config-class" or module is None:
        return line_of(spec.config_arguments)
    within = line_of_failure(error.__cause__) if error.__cause__ is not None else ""
    if within and not within.startswith("mixedprec_plugin/methods/construct.py"):
        return within
    return line_of_text(module, spec.config_classes[key])


def hook_faults(hook: Hook) -> list[str]:
    """Return why a hook's target is not what the hook was written for.

    What the hook's function names beside the original, or the result, and the object, its target
    must take under that name: callers pass by position or by name.
    """
    owner, _, name = hook.target.rpartition(".")
    try:
        within = pkgutil.resolve_name(owner)
    except (ImportError, AttributeError) as error:
        return [f"SGLang has no {owner} ({error})"]
    target = inspect.getattr_static(within, name, None)
    if target is None:
        return [f"SGLang's {owner} has no {name}"]
    function = target.__func__ if isinstance(target, classmethod | staticmethod) else target
    num_bound = 0 if isinstance(target, staticmethod) else 1
    taken = list(inspect.signature(function).parameters)[num_bound:]
    ours = [
        parameter.name
        for parameter in inspect.signature(hook.function).parameters.values()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ][num_bound + 1 :]
    return [
        f"SGLang's {name} has no parameter {parameter!r} (expected {', '.join(ours)}, "
        f"got {', '.join(taken) or 'none'})"
        for parameter in ours
        if parameter not in taken
    ]


def _place(path: Path, line: int) -> str:
    """Relative to where the package lies, as long as it lies there."""
    root = _PACKAGE.parent
    shown = path.relative_to(root) if path.is_relative_to(root) else path
    return f"{shown.as_posix()}:{line}"
