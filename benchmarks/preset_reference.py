"""Fills the tables of docs/presets.md from the preset's schema and the methods.

python -m benchmarks.preset_reference
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mixedprec_plugin.methods.interface import Method
from mixedprec_plugin.methods.registry import BUILT_IN
from mixedprec_plugin.preset.schema import preset_schema

PAGE = Path(__file__).resolve().parents[1] / "docs" / "presets.md"


def filled(text: str) -> str:
    """Return a page with everything between its markers made anew."""
    schema = preset_schema(BUILT_IN.values())
    parts = {
        "keys": _keys(schema["properties"], schema),
        "rule": _keys(schema["$defs"]["rule"]["properties"], schema),
        "source": _keys(schema["$defs"]["source"]["properties"], schema),
        "methods": "\n\n".join(_method(method) for method in BUILT_IN.values()),
    }
    for name, part in parts.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, rest = text.split(start)
        _, after = rest.split(end)
        text = f"{before}{start}{part}\n{end}{after}"
    return text


def _keys(properties: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    rows = ["| key | what it is | default |", "|---|---|---|"]
    for key, entry in properties.items():
        if "$ref" in entry:
            entry = schema["$defs"][entry["$ref"].rpartition("/")[2]]
        default = f"`{_yaml(entry['default'])}`" if "default" in entry else ""
        rows.append(f"| `{key}` | {_plain(entry['description'])} | {default} |")
    return "\n".join(rows)


def _method(method: Method) -> str:
    lines = [f"### `{method.name}`", "", method.description]
    if method.aliases:
        lines += ["", f"Aliases: {', '.join(_aliases(method))}."]
    if method.schema:
        lines += ["", "| argument | values | what it is |", "|---|---|---|"]
    for name, entry in method.schema.items():
        values = ", ".join(
            f"**`{_yaml(v)}`**" if v == entry["default"] else f"`{_yaml(v)}`" for v in entry["enum"]
        )
        lines.append(f"| `{name}` | {values} | {_plain(entry['description'])} |")
    return "\n".join(lines)


def _aliases(method: Method) -> Iterator[str]:
    for alias, implied in method.aliases.items():
        told = ", ".join(f"{key}: {_yaml(value)}" for key, value in implied.items())
        yield f"`{alias}` ({told})" if told else f"`{alias}`"


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("*.", "\\*.")


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
