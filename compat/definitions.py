"""A dotted name -> where it is defined, followed through re-exports, submodules and bases."""

from __future__ import annotations

import ast
import dataclasses
import functools
from collections.abc import Iterator

from compat.sources import Sources

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclasses.dataclass(frozen=True)
class Definition:
    """Where a name is defined.

    Attributes:
        module: the module that defines it.
        node: the class, function or assignment; None for a module, and for what lies in a package
            whose sources are not at hand.
    """

    module: str
    node: ast.AST | None

    @property
    def is_class(self) -> bool:
        """Whether it is a class."""
        return isinstance(self.node, ast.ClassDef)


@dataclasses.dataclass(frozen=True)
class Missing:
    """A dotted name that leads nowhere.

    Attributes:
        within: what was found of it, such as the module.
        name: the part that is not there.
    """

    within: str
    name: str


def find(sources: Sources, dotted: str) -> Definition | Missing:
    """Follow a dotted name: modules, then what they bind, then members of classes.

    What lies behind an instance or in a foreign package counts as found.
    """
    parts = dotted.split(".")
    for size in range(len(parts), 0, -1):
        module = ".".join(parts[:size])
        if module in sources:
            return _descend(sources, Definition(module, None), parts[size:])
        if sources.is_folder(module):
            return Missing(module, parts[size])
    return Missing("the sources", parts[0])


def _descend(sources: Sources, here: Definition, parts: list[str]) -> Definition | Missing:
    walked = here.module
    for part in parts:
        if here.node is None and here.module in sources:
            below = binding(sources, here.module, part)
        elif here.is_class:
            found = members(sources, here)
            below = found.get(part)
            if below is None and not found.is_complete:
                return Definition(here.module, None)
        else:
            return here
        if below is None:
            return Missing(walked, part)
        here, walked = below, f"{walked}.{part}"
    return here


def binding(
    sources: Sources, module: str, name: str, seen: frozenset[tuple[str, str]] = frozenset()
) -> Definition | None:
    """What a module binds a name to; None if it does not."""
    tree = sources.tree(module)
    if tree is None or (module, name) in seen:
        return None
    seen |= {(module, name)}
    for node in _statements(tree.body):
        found = _bound_by(sources, module, node, name, seen)
        if found is not None:
            return found
    submodule = f"{module}.{name}"
    return Definition(submodule, None) if submodule in sources else None


def _bound_by(
    sources: Sources, module: str, node: ast.stmt, name: str, seen: frozenset[tuple[str, str]]
) -> Definition | None:
    if isinstance(node, ast.ClassDef | Function):
        # SGLang makes a few module attributes in a module's __getattr__
        lazy = node.name == "__getattr__" and name in _strings(node)
        return Definition(module, node) if node.name == name or lazy else None
    if isinstance(node, ast.ImportFrom):
        origin = absolute(sources, module, node)
        for alias in node.names:
            if alias.name == "*":
                found = binding(sources, origin, name, seen) if sources.holds(origin) else None
            elif (alias.asname or alias.name) == name:
                if not sources.holds(origin):
                    return Definition(origin, None)
                found = binding(sources, origin, alias.name, seen)
            else:
                continue
            if found is not None:
                return found
        return None
    if isinstance(node, ast.Import):
        for alias in node.names:
            if (alias.asname or alias.name.partition(".")[0]) == name:
                return Definition(alias.name if alias.asname else name, None)
        return None
    return Definition(module, node) if name in _assigned(node) else None


def absolute(sources: Sources, module: str, node: ast.ImportFrom) -> str:
    """The module that a `from` import names, relative dots resolved."""
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    keep = len(parts) - node.level + sources.is_package(module)
    return ".".join([*parts[:keep], *([node.module] if node.module else [])])


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module's or class's own scope, those in `if`, `try` and `with` included."""
    for node in body:
        if isinstance(node, ast.If | ast.Try | ast.With):
            for field in ("body", "handlers", "orelse", "finalbody"):
                for inner in getattr(node, field, []):
                    is_handler = isinstance(inner, ast.ExceptHandler)
                    yield from _statements(inner.body if is_handler else [inner])
        else:
            yield node


def _assigned(node: ast.AST) -> set[str]:
    """Names that an assignment binds."""
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign | ast.AugAssign):
        targets = [node.target]
    return {
        inner.id for target in targets for inner in ast.walk(target) if isinstance(inner, ast.Name)
    }


def _strings(node: ast.AST) -> set[str]:
    return {
        inner.value
        for inner in ast.walk(node)
        if isinstance(inner, ast.Constant) and isinstance(inner.value, str)
    }


class Members(dict[str, Definition]):
    """Name -> where a class or one of its bases defines it.

    Attributes:
        is_complete: every base was found; if not, there may be more.
    """

    is_complete = True


def members(sources: Sources, owner: Definition) -> Members:
    """All members of a class: its own, what its methods set on self, and its bases'."""
    found = Members()
    for definition in lineage(sources, owner):
        if not isinstance(definition.node, ast.ClassDef):
            found.is_complete &= definition.module in ("abc", "enum", "typing", "builtins")
            continue
        for name, node in own_members(definition.node).items():
            found.setdefault(name, Definition(definition.module, node))
    return found


def lineage(sources: Sources, owner: Definition) -> Iterator[Definition]:
    """The class and its bases in the order in which Python asks them; a foreign one has no node."""
    found = list(_depth_first(sources, owner))
    # a base of several comes after the last of them
    yield from (base for index, base in enumerate(found) if base not in found[index + 1 :])


def _depth_first(sources: Sources, owner: Definition) -> Iterator[Definition]:
    yield owner
    if not isinstance(owner.node, ast.ClassDef):
        return
    for base in owner.node.bases:
        if isinstance(base, ast.Subscript):
            base = base.value
        name = ast.unparse(base)
        first, *rest = name.split(".")
        start = binding(sources, owner.module, first)
        found = _descend(sources, start, rest) if start else Definition("builtins", None)
        if isinstance(found, Definition):
            yield from _depth_first(sources, found)
        else:
            yield Definition(found.within, None)


@functools.lru_cache(maxsize=512)
def own_members(node: ast.ClassDef) -> dict[str, ast.AST]:
    """What a class's body binds, and what its methods set on self."""
    own: dict[str, ast.AST] = {}
    for statement in _statements(node.body):
        if isinstance(statement, ast.ClassDef | Function):
            own[statement.name] = statement
        else:
            own.update(dict.fromkeys(_assigned(statement), statement))
    for inner in ast.walk(node):
        if (
            isinstance(inner, ast.Attribute)
            and isinstance(inner.ctx, ast.Store)
            and isinstance(inner.value, ast.Name)
            and inner.value.id == "self"
        ):
            own.setdefault(inner.attr, inner)
    return own
