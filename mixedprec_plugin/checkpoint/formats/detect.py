"""A layer's tensors and `quantization_config` -> the format that it is stored in."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mixedprec_plugin.checkpoint.formats.compressed import detect_pack_quantized
from mixedprec_plugin.checkpoint.formats.foreign import detect_foreign
from mixedprec_plugin.checkpoint.formats.packed import detect_packed
from mixedprec_plugin.checkpoint.formats.promise import Promise, promise_of, tells_layers_apart
from mixedprec_plugin.checkpoint.formats.scaled import CODE_DTYPES, detect_scaled
from mixedprec_plugin.checkpoint.formats.stored import (
    FLOAT_DTYPES,
    UNQUANTIZED,
    StoredFormat,
    Tensors,
    unusable,
)
from mixedprec_plugin.checkpoint.formats.torchao import QDATA, detect_torchao
from mixedprec_plugin.checkpoint.source import Source
from mixedprec_plugin.names import without_numbers


def detect_format(
    tensors: Tensors, quantization_config: Mapping[str, Any], name: str = ""
) -> StoredFormat | None:
    """Tell how a layer with a weight matrix is stored, and where config.json says otherwise.

    Args:
        tensors: parameter suffix -> tensor, all of one layer.
        quantization_config: what the source's config.json says; may be empty.
        name: the layer's name, which ignore lists and overrides are held against.
    Returns:
        the format; None where the layer holds no weight matrix (a norm, say).
    Raises:
        CheckpointError: a pattern in `quantization_config` is no regular expression.
    """
    promise = promise_of(quantization_config, name)
    found = _from_tensors(tensors, promise)
    if found is None:
        return None
    contradictions = _contradictions(found, promise)
    said = promise.facts if promise.family == found.family else {}
    disagreements = (*found.disagreements, *contradictions)
    return dataclasses.replace(found, said=said, disagreements=disagreements)


class FormatCache:
    """The formats of the layers of sources, each found once.

    Layers of one source that are alike but for numbers in their names, with tensors of the same
    dtypes and shapes, share one object: large models have many layers of few kinds.
    """

    def __init__(self) -> None:
        self._known: dict[str, dict[str, StoredFormat | None]] = {}
        self._shared: dict[object, StoredFormat | None] = {}
        # by the address of a config: its source, and so it, outlives the plan's making
        self._apart: dict[int, bool] = {}

    def of(self, source: Source, name: str) -> StoredFormat | None:
        """The format of one layer of a source; see `detect_format`."""
        known = self._known.setdefault(source.name, {})
        if name in known:
            return known[name]
        found = known[name] = self._find(source, name)
        return found

    def _find(self, source: Source, name: str) -> StoredFormat | None:
        tensors, config = source.layers[name], source.quantization_config_of(name)
        if config and id(config) not in self._apart:
            self._apart[id(config)] = tells_layers_apart(config)
        alike = name if config and self._apart[id(config)] else without_numbers(name)
        signature = tuple([(suffix, t.dtype, t.shape) for suffix, t in tensors.items()])
        key = (source.name, alike, signature, id(config) if config else 0)
        if key not in self._shared:
            self._shared[key] = detect_format(tensors, config, name)
        return self._shared[key]


def _from_tensors(tensors: Tensors, promise: Promise) -> StoredFormat | None:
    if "qweight" in tensors:
        return detect_packed(tensors, promise)
    if "weight_packed" in tensors:
        return detect_pack_quantized(tensors, promise)
    if QDATA in tensors:
        return detect_torchao(tensors, promise)
    if foreign := detect_foreign(tensors):
        return foreign
    weight = tensors.get("weight")
    if weight is None or len(weight.shape) != 2:
        return None
    N, K = weight.shape
    if weight.dtype in FLOAT_DTYPES:
        dtype = FLOAT_DTYPES[weight.dtype]
        return StoredFormat(
            "bf16", {"dtype": dtype}, N, K, dtype, UNQUANTIZED, suffixes=frozenset({"weight"})
        )
    if weight.dtype in CODE_DTYPES:
        return detect_scaled(tensors, promise)
    return unusable(tensors, f"{weight.dtype} weights with {', '.join(sorted(tensors))}")


def _contradictions(found: StoredFormat, promise: Promise) -> tuple[str, ...]:
    """Where config.json says something else of a layer than its tensors do."""
    if promise.family is None or not found.family:
        return ()
    if promise.family != found.family:
        says = (
            "leaves it unquantized"
            if promise.family == UNQUANTIZED
            else f"says {promise.format or promise.family}"
        )
        return (f"is stored as {found.description}, config.json {says}",)
    return tuple(
        f"is stored with {key} {stored}, config.json says {promise.facts[key]}"
        for key, stored in found.facts.items()
        if promise.facts.get(key) is not None
        and _plain(stored, found.K) != _plain(promise.facts[key], found.K)
    )


def _plain(value: Any, K: int) -> Any:
    """One spelling of a value: a group of all of K is K."""
    return K if value == -1 else list(value) if isinstance(value, list | tuple) else value
