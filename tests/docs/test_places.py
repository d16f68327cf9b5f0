"""Files that the documents name are there: ours, and SGLang's."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from tests.docs.commands import PAGES, ROOT

# docs/compat.md names SGLang's of other releases
_NAMED = re.compile(r"`([\w.-]+(?:/[\w.-]+)+\.py)\b")


def test_files_that_are_named_are_there() -> None:
    spec = importlib.util.find_spec("sglang")
    assert spec is not None
    assert spec.origin is not None
    ours = [p for top in ("mixedprec_plugin", "tests", "benchmarks", "demo") for p in
            (ROOT / top).rglob("*.py")]  # fmt: skip
    there = {str(path) for path in (*ours, *Path(spec.origin).parent.rglob("*.py"))}
    missing = [
        f"{page.name}: {name}"
        for page in PAGES
        if page.name != "compat.md"
        for name in _NAMED.findall(page.read_text(encoding="utf-8"))
        if not any(path.endswith(f"/{name}") for path in there)
    ]
    assert missing == []
