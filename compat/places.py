"""Where a name went that is no longer where it was."""

from __future__ import annotations

import ast
import itertools
import re

from compat.definitions import Function
from compat.sources import Sources

_MOST = 2
# diffusion models have a server of their own, with many of the same names
_WHERE = "sglang.srt"


def elsewhere(sources: Sources, target: str) -> list[str]:
    """Where classes, functions and module constants with a dotted name's last part are defined.

    At most two, those with the longest common beginning first.
    """
    name = target.rpartition(".")[2]
    pattern = rf"^\s*(class|def|async def) {re.escape(name)}\b|^{re.escape(name)}\s*[:=]"
    found: list[str] = []
    for module in sources.mentions(pattern, _WHERE):
        tree = sources.tree(module)
        assert tree is not None
        found += [f"{module}.{inside}" for inside in _defined(tree, name)]
    return _nearest(found, target)


def modules_elsewhere(sources: Sources, target: str) -> list[str]:
    """Modules with a dotted name's last part; at most two."""
    name = target.rpartition(".")[2]
    found = [m for m in sources.below(_WHERE) if m.rpartition(".")[2] == name]
    return _nearest(found, target)


def _nearest(found: list[str], target: str) -> list[str]:
    def key(place: str) -> tuple[int, str]:
        pairs = zip(place.split("."), target.split("."), strict=False)
        shared = list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        return -len(shared), place

    return sorted(found, key=key)[:_MOST]


def _defined(scope: ast.Module | ast.ClassDef, name: str) -> list[str]:
    found = []
    for node in scope.body:
        if isinstance(node, ast.ClassDef | Function) and node.name == name:
            found.append(name)
        elif isinstance(node, ast.ClassDef):
            found += [f"{node.name}.{inside}" for inside in _defined(node, name)]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found += [name for target in targets if ast.unparse(target) == name]
    return found
