"""Files of other tools that are taken for presets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mixedprec_plugin.families.config import is_config

_INSPECT = "mixedprec inspect its folder says what is stored, and method: auto takes it so"
_RECIPE = "write rules for it: mixedprec presets lists some to start from"


def foreign_kind(data: Mapping[str, Any]) -> tuple[str, str] | None:
    """Tell what a mapping is that is no preset, and the remedy; None where it may be one."""
    if "rules" in data or ("version" in data and "quant_method" not in data):
        return None
    if is_config(data):
        return "is a model's config.json (expected a preset)", _INSPECT
    if "quant_method" in data or "config_groups" in data:
        return "is a checkpoint's quantization config (expected a preset)", _INSPECT
    if "weight_map" in data:
        return "is the index of a checkpoint (expected a preset)", _INSPECT
    if any(key.endswith(("_stage", "_modifiers", "Modifier")) for key in _keys(data)):
        return "is a recipe of llm-compressor (expected a preset)", _RECIPE
    return None


def _keys(data: Any, depth: int = 3) -> Iterator[str]:
    if isinstance(data, Mapping) and depth:
        for key, value in data.items():
            yield str(key)
            yield from _keys(value, depth - 1)
