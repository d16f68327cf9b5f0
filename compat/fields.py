"""Fields of SGLang's ServerArgs, which newer releases gather from namespaces in several files."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator

from compat.sources import Sources
from compat.uses import Use, UseKind

_FIELD: UseKind = "field"
_OPTION: UseKind = "option"
SERVER_ARGS = "sglang.srt.server_args.ServerArgs"
_MODULES = ("sglang.srt.server_args", "sglang.srt.arg_groups")
# parameters that hold ServerArgs, or the namespace that they are made from, where nothing says so
_NAMES = ("server_args", "args")
_OURS = ("mixedprec_plugin.serving", "mixedprec_plugin.cpu", "mixedprec_plugin.experts")
# their tables of launch options name fields in strings
_TABLES = ("mixedprec_plugin.serving.options", "mixedprec_plugin.experts.launch")


def field_uses(ours: Sources) -> Iterator[Use]:
    """Attributes of ours that may be fields of ServerArgs; the reference tells which are.

    Of kind `option` are those that are asked for only where they are: an older release that has
    them not has nothing that could be refused.
    """
    for package in _OURS:
        for module in ours.below(package):
            tree = ours.tree(module)
            assert tree is not None
            for node in ast.walk(tree):
                name, kind = "", _FIELD
                if isinstance(node, ast.Attribute) and ast.unparse(node.value) in _NAMES:
                    name = node.attr
                elif isinstance(node, ast.Constant) and module in _TABLES:
                    name, kind = str(node.value), _OPTION
                if name.isidentifier():
                    where = f"{ours.path(module)}:{getattr(node, 'lineno', 1)}"
                    yield Use(where, "", kind, f"{SERVER_ARGS}.{name}")


def has_field(sources: Sources, target: str) -> bool:
    """Whether a release's ServerArgs have a field."""
    return target.rpartition(".")[2] in _fields(sources)


@functools.lru_cache(maxsize=4)
def _fields(sources: Sources) -> frozenset[str]:
    return frozenset(
        inner.target.id
        for package in _MODULES
        for module in sources.below(package)
        for node in ast.parse(sources.text(module)).body
        if isinstance(node, ast.ClassDef)
        for inner in node.body
        if isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name)
    )
