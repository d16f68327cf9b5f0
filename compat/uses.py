"""What our sources import, name, call, override and read of SGLang, collected without running."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Literal

from compat.definitions import Definition, Function, absolute, lineage
from compat.sources import Sources

SGLANG = "sglang"
OURS = "mixedprec_plugin"

UseKind = Literal["name", "member", "override", "super", "field", "option"]


@dataclasses.dataclass(frozen=True)
class Call:
    """How something is called; `is_open` if more is passed by `*` or `**`."""

    num_positional: int
    keywords: tuple[str, ...]
    is_open: bool


@dataclasses.dataclass(frozen=True)
class Use:
    """One place where a source of ours leans on SGLang.

    Attributes:
        where: file and line of ours.
        scope: the class or function of ours around it, dotted; empty at module level.
        kind: `name` is imported or reached through an import; `member` is read of something whose
            class is known; `override` is a method of ours in a class with bases of SGLang;
            `super` is asked of those bases; `field` is one of ServerArgs. Only of a
            `name` is it certain that it is SGLang's: the others may be ours or torch's.
        target: dotted; for all but `name`, class and member.
        call: how it is called, if it is.
        function: our method, of an override.
    """

    where: str
    scope: str
    kind: UseKind
    target: str
    call: Call | None = None
    function: Function | None = None


def collect(ours: Sources, self_types: Mapping[str, Mapping[str, str]] | None = None) -> list[Use]:
    """Collect every use of SGLang in our package.

    Args:
        ours: the sources of mixedprec_plugin.
        self_types: function -> parameter -> dotted class, for what no annotation says.
    """
    found: dict[Use, None] = {}
    for module in sorted(ours.mentions(r"\bsglang\b", OURS)):
        found.update(dict.fromkeys(_Collector(ours, module, self_types or {}).collect()))
    return list(found)


class _Collector:
    def __init__(
        self, ours: Sources, module: str, self_types: Mapping[str, Mapping[str, str]]
    ) -> None:
        tree = ours.tree(module)
        assert tree is not None
        self.ours, self.module, self.tree, self.self_types = ours, module, tree, self_types
        self.type_only = {
            inner
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for inner in ast.walk(node)
        }
        self.names = dict(self._imported())

    def _imported(self) -> Iterator[tuple[str, str]]:
        """Local name -> dotted name in SGLang; of modules, only what the local name is bound to."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom):
                origin = absolute(self.ours, self.module, node)
                if origin.partition(".")[0] == SGLANG:
                    for alias in node.names:
                        yield alias.asname or alias.name, f"{origin}.{alias.name}"
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.partition(".")[0] == SGLANG:
                        yield (alias.asname or SGLANG), (alias.name if alias.asname else SGLANG)

    def collect(self) -> Iterator[Use]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import | ast.ImportFrom) and node not in self.type_only:
                yield from self._imports(node)
        yield from self._walk(self.tree, "", {}, None)

    def _imports(self, node: ast.Import | ast.ImportFrom) -> Iterator[Use]:
        prefix = ""
        if isinstance(node, ast.ImportFrom):
            prefix = f"{absolute(self.ours, self.module, node)}."
        for alias in node.names:
            if prefix.startswith(f"{SGLANG}.") or alias.name.partition(".")[0] == SGLANG:
                yield self._use(node, "", "name", f"{prefix}{alias.name}")

    def _use(
        self,
        node: ast.AST,
        scope: str,
        kind: UseKind,
        target: str,
        call: Call | None = None,
        function: Function | None = None,
    ) -> Use:
        where = f"{self.ours.path(self.module)}:{getattr(node, 'lineno', 1)}"
        return Use(where, scope, kind, target, call, function)

    def _walk(
        self, node: ast.AST, scope: str, types: Mapping[str, tuple[str, ...]], owner: str | None
    ) -> Iterator[Use]:
        for child in ast.iter_child_nodes(node):
            inner_scope, inner_types, inner_owner = scope, types, owner
            if isinstance(child, ast.ClassDef):
                inner_scope = f"{scope}.{child.name}".lstrip(".")
                inner_owner = self._owner(child, inner_scope)
                inner_types = {**types, **self._attribute_types(child)}
                if inner_owner:
                    yield from self._overrides(child, inner_scope, inner_owner)
            elif isinstance(child, Function):
                inner_scope = f"{scope}.{child.name}".lstrip(".")
                inner_types = {**types, **self._parameter_types(child)}
            elif isinstance(child, ast.Call):
                yield from self._called(child, scope, types, owner)
            elif isinstance(child, ast.Attribute):
                yield from self._reached(child, scope, types, owner, None)
            yield from self._walk(child, inner_scope, inner_types, inner_owner)

    def _owner(self, node: ast.ClassDef, scope: str) -> str | None:
        """The class's dotted name if SGLang is among its bases, ours between them or not."""
        start = Definition(self.module, node)
        known = any(base.module.partition(".")[0] == SGLANG for base in lineage(self.ours, start))
        return f"{self.module}.{scope}" if known else None

    def _overrides(self, node: ast.ClassDef, scope: str, owner: str) -> Iterator[Use]:
        for method in node.body:
            if isinstance(method, Function):
                inner = f"{scope}.{method.name}"
                target = f"{owner}.{method.name}"
                yield self._use(method, inner, "override", target, function=method)
            elif isinstance(method, ast.Assign):
                for name in method.targets:
                    yield self._use(method, scope, "member", f"{owner}.{ast.unparse(name)}")

    def _called(
        self,
        node: ast.Call,
        scope: str,
        types: Mapping[str, tuple[str, ...]],
        owner: str | None,
    ) -> Iterator[Use]:
        positional = [a for a in node.args if not isinstance(a, ast.Starred)]
        keywords = [keyword.arg for keyword in node.keywords if keyword.arg]
        is_open = len(positional) < len(node.args) or len(keywords) < len(node.keywords)
        call = Call(len(positional), tuple(keywords), is_open)
        if isinstance(node.func, ast.Name) and node.func.id in self.names:
            yield self._use(node, scope, "name", self.names[node.func.id], call)
        elif isinstance(node.func, ast.Attribute):
            yield from self._reached(node.func, scope, types, owner, call)

    def _reached(
        self,
        node: ast.Attribute,
        scope: str,
        types: Mapping[str, tuple[str, ...]],
        owner: str | None,
        call: Call | None,
    ) -> Iterator[Use]:
        """An attribute of something of which it is known what it is."""
        base = ast.unparse(node.value)
        first, *rest = base.split(".")
        if base == "super()" and owner:
            yield self._use(node, scope, "super", f"{owner}.{node.attr}", call)
        elif base in types:
            for dotted in types[base]:
                yield self._use(node, scope, "member", f"{dotted}.{node.attr}", call)
        elif base == "self" and owner:
            yield self._use(node, scope, "member", f"{owner}.{node.attr}", call)
        elif first in self.names:
            dotted = ".".join([self.names[first], *rest, node.attr])
            yield self._use(node, scope, "name", dotted, call)

    def _attribute_types(self, node: ast.ClassDef) -> dict[str, tuple[str, ...]]:
        return {
            f"self.{ast.unparse(statement.target)}": self._classes(statement.annotation)
            for statement in node.body
            if isinstance(statement, ast.AnnAssign) and self._classes(statement.annotation)
        }

    def _parameter_types(self, node: Function) -> dict[str, tuple[str, ...]]:
        """Parameter or local -> classes, by annotation and by `isinstance`."""
        found: dict[str, tuple[str, ...]] = {}
        for argument in [*node.args.args, *node.args.kwonlyargs]:
            if argument.annotation and (classes := self._classes(argument.annotation)):
                found[argument.arg] = classes
        for inner in ast.walk(node):
            if isinstance(inner, ast.Call) and ast.unparse(inner.func) == "isinstance":
                name = ast.unparse(inner.args[0])
                if classes := self._classes(inner.args[1]):
                    found[name] = (*found.get(name, ()), *classes)
        for name, dotted in self.self_types.get(node.name, {}).items():
            found[name] = (dotted,)
        return found

    def _classes(self, annotation: ast.expr) -> tuple[str, ...]:
        """The SGLang classes that an annotation names."""
        if isinstance(annotation, ast.BinOp):
            return (*self._classes(annotation.left), *self._classes(annotation.right))
        if isinstance(annotation, ast.Tuple):
            return tuple(name for part in annotation.elts for name in self._classes(part))
        if not isinstance(annotation, ast.Name | ast.Attribute):
            return ()
        first, *rest = ast.unparse(annotation).split(".")
        return (".".join([self.names[first], *rest]),) if first in self.names else ()
