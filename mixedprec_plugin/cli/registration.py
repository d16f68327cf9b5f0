"""Is the plugin whole in this process, and which line of ours to look at where SGLang changed."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any, Literal

import mixedprec_plugin
from mixedprec_plugin.errors import Problem

if TYPE_CHECKING:
    from mixedprec_plugin.methods.interface import Method
    from mixedprec_plugin.serving.hooks import Hook

_PACKAGE = Path(mixedprec_plugin.__file__).parent
Status = Literal["ok", "absent", "failed"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        section: what it belongs to: `configs`, `registration`, `versions` or `device`.
        name: what was looked at.
        status: `absent` is what this machine cannot have, and no fault.
        details: the same as data, for --json.
    """

    section: str
    name: str
    status: Status
    text: str
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def failed(section: str, problem: Problem) -> Finding:
    """Return the line that reports a problem."""
    what = f"{problem.what}; {problem.remedy}" if problem.remedy else problem.what
    return Finding(section, problem.where, "failed", what)


def examine_registration() -> list[Finding]:
    """Report whether SGLang knows the load format, the flag, the hooks and the platform."""
    findings = _examine_imports() or _examine_hooks()
    return [*findings, _examine_flag(), _examine_platform()]


def _examine_imports() -> list[Finding]:
    """Our modules that take what they need from SGLang by name, and do not find it."""
    findings = []
    for module in ("mixedprec_plugin.serving.hooks", "mixedprec_plugin.serving.loader"):
        try:
            importlib.import_module(module)
        except ImportError as error:
            text = f"cannot be imported: {error}; look at {line_of_failure(error)}"
            findings.append(Finding("registration", module, "failed", text))
    return findings


def _examine_hooks() -> list[Finding]:
    """Whether our hooks are there, and what SGLang's functions have become that they are for."""
    from mixedprec_plugin.serving import hooks
    from mixedprec_plugin.serving.flags import LOAD_FORMAT

    problems = hooks.check_registration()
    findings = [failed("registration", problem) for problem in problems]
    for hook in hooks.HOOKS:
        for fault in hook_faults(hook):
            place = f"{line_of_text(hooks, hook.target)} and {line_of(hook.function)}"
            text = f"{fault}; look at {place}"
            findings.append(Finding("registration", hook.target, "failed", text))
    if not problems:
        targets = ", ".join(hook.target.rpartition("srt.")[2] for hook in hooks.HOOKS)
        findings.append(Finding("registration", "load format", "ok", LOAD_FORMAT))
        findings.append(Finding("registration", "hooks", "ok", targets))
    return findings


def _examine_flag() -> Finding:
    from sglang.srt.server_args import ServerArgs

    flag = "--mixedprec-config"
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    if flag in parser.format_usage():
        return Finding("registration", "flag", "ok", flag)
    text = f"{flag} is not among the server's flags; SGLang's log says why the plugin failed"
    return Finding("registration", "flag", "failed", text)


def _examine_platform() -> Finding:
    from sglang.srt.platforms import current_platform

    kind = type(current_platform)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if kind.__name__ == "SRTPlatform":
        text = (
            "no platform: no accelerator is there and the CPU platform is not registered; "
            "run 'pip install mixedprec-plugin'"
        )
        return Finding("registration", "platform", "failed", text)
    return Finding("registration", "platform", "ok", name)


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

    By the rule of the problem: `no-config-class` goes back to where the class is named, the rest to
    the builder of arguments; an import that failed within our own class comes first.
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
