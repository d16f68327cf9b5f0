"""Why a layer is not served, each reason with a remedy that was tried, not guessed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from mixedprec_plugin.methods.cards import version
from mixedprec_plugin.methods.interface import Arguments, Fault, LayerShape, Method, Target
from mixedprec_plugin.methods.registry import METHODS
from mixedprec_plugin.methods.shapes import split_faults

_UNQUANTIZED = "unquantized"


def find_faults(
    method: str, arguments: Arguments, shape: LayerShape, target: Target
) -> list[Fault]:
    """Return everything that keeps a layer from being served in a method, with remedies.

    Args:
        method: canonical name.
        arguments: all its arguments, as `registry.bind` returns them.
        shape: a linear layer's or an expert's.
        target: what is planned for.
    """
    spec = METHODS[method]
    return [
        fault
        if fault.remedy
        else fault._replace(remedy=_remedy(fault, spec, arguments, shape, target))
        for fault in dict.fromkeys(_faults(spec, arguments, shape, target))
    ]


def _faults(spec: Method, arguments: Arguments, shape: LayerShape, target: Target) -> list[Fault]:
    """A method's own faults, and the one that every method has where the GPU is too old."""
    if split := split_faults(shape):
        remedy = "use a tensor-parallel size that divides it"
        return [Fault("shape", text, remedy) for text in split]
    found = spec.faults(arguments, shape, target)
    gpu = target.gpu
    if gpu is None or not spec.config_classes or gpu.capability >= spec.min_capability:
        return found
    text = (
        f"{spec.name} does not run on this GPU, whose compute capability is "
        f"{version(gpu.capability)} (expected {version(spec.min_capability)} or more)"
    )
    return [*(fault for fault in found if fault.rule == "shape"), Fault("gpu", text)]


def _runs(spec: Method, arguments: Arguments, shape: LayerShape, target: Target) -> bool:
    return not _faults(spec, arguments, shape, target)


def _remedy(
    fault: Fault, spec: Method, arguments: Arguments, shape: LayerShape, target: Target
) -> str:
    if fault.rule == "gpu":
        return _other_for_gpu(spec, arguments, shape, target)
    ways = list(_alternatives(spec, arguments, shape, target))
    ways += _fewer_ranks(spec, arguments, shape, target)
    return ", or ".join(ways) or f"use method: {_UNQUANTIZED}"


def _other_for_gpu(spec: Method, arguments: Arguments, shape: LayerShape, target: Target) -> str:
    """What the GPU does run."""
    if _runs(spec, arguments, dataclasses.replace(shape, dtype="F16"), target):
        return "start with --dtype float16"
    if "group_size" in arguments and _runs(spec, {**arguments, "group_size": 128}, shape, target):
        return "use group_size: 128"
    others = [METHODS[name] for name, _ in spec.alternatives if name != spec.name]
    names = [other.name for other in others if _runs(other, other.defaults, shape, target)]
    return f"use method: {' or '.join((*names, _UNQUANTIZED))}"


def _alternatives(
    spec: Method, arguments: Arguments, shape: LayerShape, target: Target
) -> Iterator[str]:
    """Yield what the layer runs in instead, up to the first method that is another one."""
    for name, settings in spec.alternatives:
        other = METHODS[name]
        base = arguments if other is spec else other.defaults
        works = [s for s in settings if _runs(other, {**base, **s}, shape, target)]
        if works:
            yield _written(other, works[0], is_own=other is spec)
        if works and other is not spec:
            return


def _written(other: Method, settings: Arguments, *, is_own: bool) -> str:
    """Settings as the reader would type them; defaults of another method are left out."""
    if is_own:
        for alias, implied in other.aliases.items():
            if implied == settings:
                return f"use method: {alias}"
    defaults = other.defaults
    typed = ", ".join(
        f"{key}: {'null' if value is None else value}"
        for key, value in settings.items()
        if is_own or defaults[key] != value
    )
    if is_own:
        return f"use {typed}"
    return f"use method: {other.name} with {typed}" if typed else f"use method: {other.name}"


def _fewer_ranks(
    spec: Method, arguments: Arguments, shape: LayerShape, target: Target
) -> list[str]:
    for size in range(shape.tp_size - 1, 0, -1):
        # key and value shards are repeated on no more ranks than before
        ranks = tuple(min(count, size) for count in shape.shard_ranks)
        fewer = dataclasses.replace(shape, tp_size=size, shard_ranks=ranks)
        if shape.tp_size % size == 0 and _runs(spec, arguments, fewer, target):
            return [f"serve with --tp {size}"]
    return []
