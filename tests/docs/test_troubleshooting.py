"""The messages of docs/troubleshooting.md are those that the code has."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.docs.commands import ROOT


def _texts() -> Iterator[str]:
    """Every string of the package's code, as it is joined, with … for what is filled in."""
    for path in sorted((ROOT / "mixedprec_plugin").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "…" for p in node.values)
                yield "".join(map(str, parts))


def test_every_message_is_one_of_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^## `(.+)`$", page, flags=re.MULTILINE)
    assert len(messages) > 5
    texts = list(_texts())
    assert [m for m in messages if not any(m in text for text in texts)] == []
