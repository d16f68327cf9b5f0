"""Writes schemas/: what editors and other tools read of what `methods` and `preset.schema` know.

python -m mixedprec_plugin.preset.schema_files
"""

from __future__ import annotations

import json
from pathlib import Path

from mixedprec_plugin.methods.registry import BUILT_IN
from mixedprec_plugin.preset.schema import PRESET_SCHEMA, preset_schema
from mixedprec_plugin.resources import schema_path


def schema_files() -> dict[Path, str]:
    """Return the text of every file below schemas/ by its path."""
    schemas = {schema_path(PRESET_SCHEMA): preset_schema(BUILT_IN.values())}
    for method in BUILT_IN.values():
        path = schema_path("methods") / f"{method.name}.schema.json"
        schemas[path] = {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": f"Arguments of method {method.name}",
            "description": method.description,
            "type": "object",
            "properties": dict(method.schema),
            "additionalProperties": False,
        }
    return {
        path: json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
        for path, schema in schemas.items()
    }


if __name__ == "__main__":
    for path, text in schema_files().items():
        path.write_text(text, encoding="utf-8")
