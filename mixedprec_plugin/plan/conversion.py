"""How a layer's stored form and its scheme relate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mixedprec_plugin.checkpoint.formats import StoredFormat
from mixedprec_plugin.preset.model import Scheme


def is_stored_as(stored: StoredFormat, scheme: Scheme) -> bool:
    """Whether a layer's tensors are what its scheme runs, so that they are taken as they are."""
    return stored.method == scheme.method and not different_arguments(stored, scheme)


def different_arguments(stored: StoredFormat, scheme: Scheme) -> Mapping[str, Any]:
    """Arguments on which a layer of the right method is stored otherwise -> how it is stored."""
    different = {
        key: value
        for key, value in stored.arguments.items()
        if scheme.arguments.get(key) is not None
        and _plain(key, scheme.arguments[key], stored.K) != _plain(key, value, stored.K)
    }
    if stored.method == "fp8" and scheme.arguments["weight_block_size"] is None:
        block = stored.arguments.get("weight_block_size")
        different |= {"weight_block_size": block} if block else {}
    return different


def _plain(key: str, value: Any, K: int) -> Any:
    """One spelling of a value: a group of all of K is K."""
    return K if key == "group_size" and value == -1 else value
