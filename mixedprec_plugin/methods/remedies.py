"""Why a layer is not served, each reason with a remedy that was tried, not guessed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

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
        arguments: all the method's arguments, as `registry.bind` returns them.
    """
    attempt = _Attempt(METHODS[method], arguments, shape, target)
    return [
        fault._replace(remedy=fault.remedy or attempt.remedy(fault))
        for fault in dict.fromkeys(attempt.faults())
    ]


@dataclasses.dataclass(frozen=True)
class _Attempt:
    """To serve a layer in a method."""

    spec: Method
    arguments: Arguments
    shape: LayerShape
    target: Target

    def faults(self) -> list[Fault]:
        """The method's own, and the one that every method has where the GPU is too old."""
        spec, gpu = self.spec, self.target.gpu
        if split := split_faults(self.shape):
            remedy = "use a tensor-parallel size that divides it"
            return [Fault("shape", text, remedy) for text in split]
        if self.shape.is_head and spec.config_classes and not spec.serves_heads:
            return [Fault("shape", f"SGLang leaves lm_head unquantized in {spec.name}")]
        if self.shape.is_expert and self.shape.has_bias and not spec.adds_expert_biases:
            names = [x.name for x in METHODS.values() if x.adds_expert_biases and self._runs_in(x)]
            remedy = f"use method: {' or '.join(names)}"
            return [Fault("shape", f"experts in {spec.name} add no bias, and it has one", remedy)]
        found = spec.faults(self.arguments, self.shape, self.target)
        if gpu is None or not spec.config_classes or gpu.capability >= spec.min_capability:
            return found
        text = (
            f"{spec.name} does not run on this GPU, whose compute capability is "
            f"{version(gpu.capability)} (expected {version(spec.min_capability)} or more)"
        )
        return [*(fault for fault in found if fault.rule == "shape"), Fault("gpu", text)]

    def runs(self, **changes: Any) -> bool:
        """Whether the layer is served with something else in place."""
        return not dataclasses.replace(self, **changes).faults()

    def _runs_in(self, other: Method) -> bool:
        return self.runs(spec=other, arguments=other.defaults)

    def remedy(self, fault: Fault) -> str:
        """What works instead, tried."""
        if fault.rule == "gpu":
            return self._other_for_gpu()
        ways = [*self._alternatives(), *self._fewer_ranks()]
        return ", or ".join(ways) or f"use method: {_UNQUANTIZED}"

    def _other_for_gpu(self) -> str:
        if self.runs(shape=dataclasses.replace(self.shape, dtype="F16")):
            return "start with --dtype float16"
        if "group_size" in self.arguments and self.runs(
            arguments={**self.arguments, "group_size": 128}
        ):
            return "use group_size: 128"
        others = [METHODS[name] for name, _ in self.spec.alternatives if name != self.spec.name]
        names = [one.name for one in others if self._runs_in(one)]
        return f"use method: {' or '.join((*names, _UNQUANTIZED))}"

    def _alternatives(self) -> Iterator[str]:
        """What the layer runs in instead, up to the first method that is another one."""
        for name, settings in self.spec.alternatives:
            other = METHODS[name]
            is_own = other is self.spec
            base = self.arguments if is_own else other.defaults
            works = [s for s in settings if self.runs(spec=other, arguments={**base, **s})]
            if works:
                yield _written(other, works[0], is_own=is_own)
            if works and not is_own:
                return

    def _fewer_ranks(self) -> list[str]:
        shape = self.shape
        for size in range(shape.tp_size - 1, 0, -1):
            # key and value shards are repeated on no more ranks than before
            ranks = tuple(min(count, size) for count in shape.shard_ranks)
            fewer = dataclasses.replace(shape, tp_size=size, shard_ranks=ranks)
            if shape.tp_size % size == 0 and self.runs(shape=fewer):
                return [f"serve with --tp {size}"]
        return []


def _written(other: Method, settings: Arguments, *, is_own: bool) -> str:
    """Settings as the reader would type them; defaults of another method are left out."""
    for alias, implied in other.aliases.items() if is_own else ():
        if implied == settings:
            return f"use method: {alias}"
    typed = ", ".join(
        f"{key}: {'null' if value is None else value}"
        for key, value in settings.items()
        if is_own or other.defaults[key] != value
    )
    if is_own:
        return f"use {typed}"
    return f"use method: {other.name}" + (f" with {typed}" if typed else "")
