"""What would serve a layer that a method refuses: tried, not guessed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mixedprec_plugin.methods.partitions import split_faults
from mixedprec_plugin.methods.spec import Arguments, LayerShape

_GROUPS = tuple({"group_size": size} for size in (128, 64, 32, -1))
_GROUPS_OF_8_BITS = tuple({"bits": 8, **group} for group in _GROUPS)

# What to try for a refused method, the nearest in size and quality first. Arguments that are not
# named are the reader's own for the same method, and the defaults for another one.
_TRIES: Mapping[str, tuple[tuple[str, tuple[dict[str, Any], ...]], ...]] = {
    "awq": (("awq", _GROUPS), ("gptq", _GROUPS), ("fp8", ({},))),
    "gptq": (("gptq", _GROUPS), ("awq", _GROUPS), ("fp8", ({},))),
    "fp8": (("fp8", ({"weight_block_size": None},)), ("gptq", _GROUPS_OF_8_BITS)),
    "fp8_channel": (("gptq", _GROUPS_OF_8_BITS),),
    "blockwise_int8": (
        ("blockwise_int8", ({"weight_block_size": [64, 64]},)),
        ("fp8", ({},)),
        ("gptq", _GROUPS_OF_8_BITS),
    ),
}


def pair(
    method: str, arguments: Arguments, shape: LayerShape, device: str, texts: list[str]
) -> list[tuple[str, str]]:
    """Return each text with a remedy that works for the layer.

    Args:
        method: canonical name of the method that refuses.
        arguments: its bound arguments.
        shape: the layer.
        device: `cuda` or `cpu`.
        texts: why it refuses.
    """
    if not texts:
        return []
    remedy = _suggest(method, arguments, shape, device)
    return [(text, remedy) for text in dict.fromkeys(texts)]


def _suggest(method: str, arguments: Arguments, shape: LayerShape, device: str) -> str:
    if split_faults(shape):
        return "use a tensor-parallel size that divides it"
    ways = []
    for name, settings in _TRIES[method]:
        base = arguments if name == method else _specs()[name].defaults
        works = [s for s in settings if not _faults(name, {**base, **s}, shape, device)]
        if works:
            ways.append(_write(name, method, works[0]))
        if works and name != method:
            break
    fewer = [
        size
        for size in range(shape.tp_size - 1, 0, -1)
        if shape.tp_size % size == 0
        and not _faults(method, arguments, _with_ranks(shape, size), device)
    ]
    if fewer:
        ways.append(f"serve with --tp {fewer[0]}")
    return ", or ".join(ways) or "use method: unquantized"


def _write(name: str, method: str, settings: Mapping[str, Any]) -> str:
    """A try as the reader would type it; defaults of another method are left out."""
    if name == method == "fp8":
        return "use method: fp8_tensor"
    defaults = _specs()[name].defaults
    typed = ", ".join(
        f"{key}: {'null' if value is None else value}"
        for key, value in settings.items()
        if name == method or defaults[key] != value
    )
    if name == method:
        return f"use {typed}"
    return f"use method: {name} with {typed}" if typed else f"use method: {name}"


def _with_ranks(shape: LayerShape, tp_size: int) -> LayerShape:
    """The same layer on fewer ranks; key and value shards are repeated on no more than before."""
    ranks = tuple(min(count, tp_size) for count in shape.shard_ranks)
    return dataclasses.replace(shape, tp_size=tp_size, shard_ranks=ranks)


def _specs() -> Mapping[str, Any]:
    from mixedprec_plugin.methods import awq, blockwise_int8, fp8, fp8_channel, gptq

    modules = (awq, blockwise_int8, fp8, fp8_channel, gptq)
    return {module.SPEC.name: module.SPEC for module in modules}


def _faults(method: str, arguments: Arguments, shape: LayerShape, device: str) -> list[str]:
    from mixedprec_plugin.methods import awq, blockwise_int8, fp8, fp8_channel, gptq

    find = {
        "awq": awq.faults,
        "gptq": gptq.faults,
        "fp8": fp8.faults,
        "fp8_channel": fp8_channel.faults,
        "blockwise_int8": blockwise_int8.faults,
    }[method]
    return find(arguments, shape, device)
