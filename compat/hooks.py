"""Our hooks as serving/hooks.py states them, against the functions that they wrap."""

from __future__ import annotations

import ast
import dataclasses

from compat.definitions import Definition, Function, Missing, find
from compat.signatures import kind, misfit, signature
from compat.sources import Sources

MODULE = "mixedprec_plugin.serving.hooks"


@dataclasses.dataclass(frozen=True)
class HookRow:
    """A row of HOOKS.

    Attributes:
        where: file and line of ours.
        target: dotted function of SGLang.
        function: what we put around it; its first parameter is the original or the result.
    """

    where: str
    target: str
    function: Function


def read_hooks(ours: Sources) -> list[HookRow]:
    """Read the table of hooks out of its source."""
    tree = ours.tree(MODULE)
    assert tree is not None
    rows = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Hook":
            target, function = node.args[0], node.args[1]
            assert isinstance(target, ast.Constant)
            where = f"{ours.path(MODULE)}:{node.lineno}"
            found = find(ours, f"{MODULE}.{ast.unparse(function)}")
            assert isinstance(found, Definition)
            assert isinstance(found.node, Function)
            rows.append(HookRow(where, str(target.value), found.node))
    return rows


def self_types(rows: list[HookRow], sglang: Sources) -> dict[str, dict[str, str]]:
    """Hook function -> its parameter that is the object whose method is hooked -> that class."""
    found = {}
    for row in rows:
        target = find(sglang, row.target)
        parameters = row.function.args.args
        if (
            isinstance(target, Definition)
            and isinstance(target.node, Function)
            and kind(target.node) == "method"
            and len(parameters) > 1
        ):
            found[row.function.name] = {parameters[1].arg: row.target.rpartition(".")[0]}
    return found


def hook_faults(row: HookRow, release: Sources, reference: Sources) -> list[str]:
    """Why a hook would not work on a release; the reference tells the target's kind."""
    target, known = find(release, row.target), find(reference, row.target)
    if isinstance(target, Missing):
        return [f"no {target.name} in {target.within}"]
    if not isinstance(target.node, Function):
        return ["is no function"]
    faults = []
    wanted = getattr(known, "node", None)
    if isinstance(wanted, Function) and kind(target.node) != kind(wanted):
        faults.append(f"is a {kind(target.node)} (expected a {kind(wanted)})")
    return faults + _parameter_faults(row.function, target.node)


def _parameter_faults(ours: Function, theirs: Function) -> list[str]:
    """Callers pass by position or by name: what ours names must be there under that name."""
    wanted = signature(theirs)
    names = list(wanted.parameters)
    skip = 0 if kind(theirs) == "staticmethod" else 1
    in_order = [argument.arg for argument in ours.args.args[1:]][skip:]
    own = in_order + [argument.arg for argument in ours.args.kwonlyargs]
    faults = [
        f"has no parameter {name} (takes {', '.join(names)})"
        for name in own
        if name not in names[skip:]
    ]
    if not faults and in_order != names[skip : skip + len(in_order)]:
        faults.append(f"takes {', '.join(names)} (expected {', '.join(in_order)} first)")
    if not (ours.args.vararg or ours.args.kwarg):
        more = [name for name in names[skip:] if name not in own]
        faults += [f"has a parameter {name} that the hook does not take" for name in more]
    for node in ast.walk(ours):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "original":
            positional = [a for a in node.args if not isinstance(a, ast.Starred)]
            is_open = len(positional) < len(node.args) or len(node.keywords) > 0
            if not is_open and (text := misfit(wanted, len(positional), [])):
                faults.append(f"called as original(): {text}")
    return faults
