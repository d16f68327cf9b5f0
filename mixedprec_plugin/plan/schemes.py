"""From the rule that decides about a layer to its scheme."""

from __future__ import annotations

import dataclasses

from mixedprec_plugin.families.names import NEVER_QUANTIZED, Kind
from mixedprec_plugin.methods import registry
from mixedprec_plugin.methods.interface import Arguments, Target
from mixedprec_plugin.methods.registry import AUTO, METHODS, UNQUANTIZED
from mixedprec_plugin.methods.stored import StoredFormat
from mixedprec_plugin.plan.auto import described
from mixedprec_plugin.preset.model import Rule, Scheme


class SchemeChooser:
    """The scheme of each layer; layers of one rule or of no rule that are alike share one."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._known: dict[object, Scheme] = {}

    def of(self, rule: Rule | None, stored: StoredFormat | None, kind: Kind) -> Scheme | None:
        """The scheme of a layer; None where it has no weight that could be quantized.

        What is never quantized, and is stored so, may be dequantized.

        Args:
            rule: the rule that decides; None leaves the layer as it is stored.
            stored: the format of the layer's weight in its source.
        """
        is_dequantized = (
            rule is not None and rule.scheme.method == UNQUANTIZED and kind != "draft"
            and stored is not None and not stored.is_float
        )  # fmt: skip
        if stored is None or (kind in NEVER_QUANTIZED and not is_dequantized):
            return None
        key = (id(rule), id(stored))
        if key not in self._known:
            self._known[key] = self._made(rule, stored)
        return self._known[key]

    def _made(self, rule: Rule | None, stored: StoredFormat) -> Scheme:
        if rule is None:
            return Scheme("as stored", *_as_stored(stored, stored.arguments))
        scheme = rule.scheme
        if scheme.method != AUTO:
            arguments = METHODS[scheme.method].complete(scheme.arguments, stored)
            same = arguments == scheme.arguments
            return scheme if same else dataclasses.replace(scheme, arguments=arguments)
        if self._target.device == "cuda" and not stored.is_float:
            # layers of different sources and formats are different schemes
            arguments = {"source": scheme.source, "stored": described(stored)}
            return dataclasses.replace(scheme, arguments=arguments)
        whole = {"group_size": stored.K} if stored.is_one_group else {}
        method, arguments = _as_stored(stored, {**stored.arguments, **whole})
        return dataclasses.replace(scheme, method=method, arguments=arguments)


def _as_stored(stored: StoredFormat, arguments: Arguments) -> tuple[str, Arguments]:
    if stored.is_float or not stored.method:
        return registry.bind(UNQUANTIZED, {"dtype": None})
    return registry.bind(stored.method, arguments)
