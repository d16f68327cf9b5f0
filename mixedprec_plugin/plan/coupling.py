"""Layers that are right only behind their own norm, and what the plan does about it.

Where the sources of a norm's consumers store it alike (each rounded to its own dtype), nothing is
coupled. Elsewhere the norm is served from the source that a rule names for norms alone; or that all
consumers come from; or that those come from which are taken as stored or repacked, and so cannot
change; or where the rules had it from. Columns of a consumer from elsewhere are multiplied by (its
own source's norm / the served one), exactly; where they cannot be, it is an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from mixedprec_plugin.checkpoint.headers import StoredTensor
from mixedprec_plugin.checkpoint.source import Source
from mixedprec_plugin.checkpoint.values import Values, are_equal
from mixedprec_plugin.errors import Problem
from mixedprec_plugin.families.names import NEVER_QUANTIZED, last_component
from mixedprec_plugin.families.table import family_of
from mixedprec_plugin.families.wiring import Unit, coupled_units
from mixedprec_plugin.methods.stored import Tensors
from mixedprec_plugin.plan.folding import fold_names
from mixedprec_plugin.plan.matching import Matches
from mixedprec_plugin.plan.model import PlannedLayer, Rescale

_CHANGEABLE = frozenset({"cast", "quantize", "dequantize", "requantize"})
# what is compared beside a norm: routers' biases, short convolutions; not stacked experts
_SMALL_BYTES = 1 << 20


class Coupling:
    """Settles the norms of a plan over several sources.

    Args:
        layers: of the whole model, as the rules have them.
        tied: tied layer name -> the layer whose weight it shares.
        dtype: what the model runs in; norms that differ by less than its rounding are one.
        trusted: whether a source that lacks a norm counts as having the model's.
    """

    def __init__(
        self,
        layers: Sequence[PlannedLayer],
        sources: Mapping[str, Source],
        matches: Matches,
        tied: Mapping[str, str],
        values: Values,
        dtype: str,
        trusted: bool,
    ) -> None:
        self.layers = {layer.name: layer for layer in layers}
        kinds = {layer.name: layer.kind for layer in layers}
        self.units = coupled_units(kinds, tied, sources["model"].config)
        self._sources = sources
        # where it is not known, no layer is rescaled
        self._offset = family_of(sources["model"].config).norm_offset or 0.0
        self._values = values
        self._dtype = dtype
        # norms and the like, under a rule that matches nothing else
        quantized = {name for name, kind in kinds.items() if kind not in NEVER_QUANTIZED}
        alone = {index for index, names in matches.matched.items() if not names & quantized}
        self._explicit = {name for name, rule in matches.deciding.items() if rule.index in alone}
        self._trusted = trusted
        self._errors: dict[tuple[str, str, str], list[tuple[str, float]]] = {}

    def settle(self) -> list[Problem]:
        """Choose the source of every norm and rescale consumers; changes `layers`.

        Returns:
            an error for each kind of unit that cannot be made right.
        """
        for unit in self.units:
            self._settle(unit)
        return [
            Problem(
                where or ", ".join(fold_names(norm for norm, _ in found)),
                what.replace("{distance}", f"{max(distance for _, distance in found):.1f}x"),
                remedy,
                "coupled-layers",
            )
            for (where, what, remedy), found in self._errors.items()
        ]

    def _agree(self, name: str, first: str, second: str) -> bool:
        one, other = self._norm(name, first), self._norm(name, second)
        return one.keys() == other.keys() and all(self._is_same(one[s], other[s]) for s in one)

    def _is_same(self, one: StoredTensor, other: StoredTensor) -> bool:
        if one.num_bytes > _SMALL_BYTES:
            return True
        values = self._values.of
        return are_equal(values(one), values(other), (one.dtype, other.dtype, self._dtype))

    def _norm(self, name: str, source: str) -> Tensors:
        """A source's norm; a trusted one that holds none has the model's."""
        layers = self._sources[source].layers
        return layers[name] if name in layers else self._sources["model"].layers[name]

    def _settle(self, unit: Unit) -> None:
        norm = self.layers[unit.norm]
        consumers = [self.layers[name] for name in (*unit.consumers, *unit.fixed)]
        used = list(dict.fromkeys(layer.source for layer in consumers))
        if set(used) <= {norm.source}:
            return
        lacking = [source for source in used if unit.norm not in self._sources[source].layers]
        if lacking and not self._trusted:
            what = (
                f"{_named(consumers, lacking[0])} come from {lacking[0]!r}, which holds no such "
                "norm, so nothing tells whether scales were folded into it"
            )
            remedy = "take them from a checkpoint that holds its norms, or set trust_sources: true"
            self._error(unit, what, remedy)
            return
        if self._are_one(unit.norm, [norm.source, *used]):
            return
        unchangeable = [layer for layer in consumers if not self._is_changeable(layer, unit)]
        served = self._choose(unit, norm, used, unchangeable)
        if served is None:
            return
        if served != norm.source:
            # what is served keeps its dtypes and shapes
            inputs = self._norm(unit.norm, served)
            self.layers[unit.norm] = dataclasses.replace(
                norm,
                source=served,
                inputs=inputs,
                bytes_before=sum(tensor.num_bytes for tensor in inputs.values()),
                note="follows its consumers",
            )
        for layer in consumers:
            if not self._agree(unit.norm, served, layer.source):
                self._rescale(unit, layer, served)

    def _is_changeable(self, layer: PlannedLayer, unit: Unit) -> bool:
        if layer.name in unit.fixed or layer.kind == "embedding" or layer.stored is None:
            return False
        is_plain = layer.action == "as stored" and layer.stored.is_float
        return layer.stored.is_readable and (is_plain or layer.action in _CHANGEABLE)

    def _choose(
        self, unit: Unit, norm: PlannedLayer, used: list[str], unchangeable: list[PlannedLayer]
    ) -> str | None:
        """The source that a norm is served from; None where there is none that is right."""
        needed = list(dict.fromkeys(layer.source for layer in unchangeable))
        if unit.norm in self._explicit:
            wrong = [s for s in needed if not self._agree(unit.norm, norm.source, s)]
            if wrong:
                what = (
                    f"takes {last_component(unit.norm)} from {norm.source!r}, which is wrong for "
                    f"{_named(unchangeable, wrong[0])} of {wrong[0]!r} (expected {wrong[0]!r}; the "
                    "two differ by up to {distance})"
                )
                remedy = f"take the norm from {wrong[0]!r} or remove the rule"
                where = str(norm.rule.location) if norm.rule else ""
                distance = self._distance(unit.norm, norm.source, wrong[0])
                self._error(unit, what, remedy, where, distance)
                return None
            return norm.source
        candidates = needed or ([norm.source] if norm.source in used else [])
        if self._are_one(unit.norm, used):
            candidates = used
        elif not self._are_one(unit.norm, needed):
            self._two_groups(unit, needed, unchangeable)
            return None
        if not candidates or norm.source in candidates:
            return norm.source
        return "model" if "model" in candidates else candidates[0]

    def _are_one(self, norm: str, sources: Sequence[str]) -> bool:
        return all(self._agree(norm, sources[0], source) for source in sources[1:])

    def _rescale(self, unit: Unit, layer: PlannedLayer, served: str) -> None:
        own, new = self._norm(unit.norm, layer.source), self._norm(unit.norm, served)
        if reason := self._why_not_rescale(layer, own, new):
            what = (
                f"differs between {served!r} and {layer.source!r}, and "
                f"{last_component(layer.name)} cannot be rescaled: {reason}"
            )
            remedy = f"take all of its consumers from {served!r} or all from {layer.source!r}"
            self._error(unit, what, remedy)
            return
        self.layers[layer.name] = dataclasses.replace(
            layer,
            action="cast" if layer.action == "as stored" else layer.action,
            rescale=Rescale(own["weight"], new["weight"], self._offset, served),
        )

    def _why_not_rescale(self, layer: PlannedLayer, own: Tensors, new: Tensors) -> str:
        import numpy as np

        if own.keys() != new.keys() or "weight" not in own:
            return f"it holds {', '.join(sorted(new))} here and {', '.join(sorted(own))} there"
        assert layer.stored is not None
        if own["weight"].shape != (layer.stored.K,):
            return f"it scales {list(own['weight'].shape)} features, not {[layer.stored.K]}"
        read = self._values.of
        over, under = (read(norm["weight"]) + self._offset for norm in (own, new))
        if over.shape != under.shape or bool(np.any((over == 0) != (under == 0))):
            return "one of its weights is zero in only one of the two sources"
        ratio = np.divide(over, under, out=np.ones_like(under), where=under != 0)
        for suffix in own.keys() - {"weight"}:
            if not are_equal(read(own[suffix]), read(new[suffix]) * ratio, ("BF16",)):
                return f"its {suffix} does not change as its weight does"
        return ""

    def _two_groups(self, unit: Unit, needed: list[str], unchangeable: list[PlannedLayer]) -> None:
        parts = [f"{_named(unchangeable, source)} of {source!r}" for source in needed]
        what = (
            f"no norm is right for both {' and '.join(parts)}: they are stored behind their own, "
            "which differ by up to {distance}"
        )
        remedy = "take all of them from one source"
        if unit.fixed:
            what += "; it is not known which of them read it"
        else:
            remedy += ", or have one side quantized here from bf16"
        self._error(unit, what, remedy, distance=self._distance(unit.norm, needed[0], needed[-1]))

    def _distance(self, norm: str, first: str, second: str) -> float:
        """The largest factor between two sources' norms."""
        import numpy as np

        one, other = self._norm(norm, first), self._norm(norm, second)
        suffix = "weight" if "weight" in one.keys() & other.keys() else next(iter(one), "")
        if suffix not in other or one[suffix].shape != other[suffix].shape:
            return float("inf")
        pair = [np.abs(self._values.of(x[suffix]) + self._offset) for x in (one, other)]
        low, high = np.minimum(*pair), np.maximum(*pair)
        return float((high / np.maximum(low, 1e-30)).max())

    def _error(
        self, unit: Unit, what: str, remedy: str, where: str = "", distance: float = 1.0
    ) -> None:
        """Note an error; `what` may hold {distance}, which becomes the largest of all its units."""
        self._errors.setdefault((where, what, remedy), []).append((unit.norm, distance))


def _named(layers: Sequence[PlannedLayer], source: str) -> str:
    """Last components of the layers that come from a source."""
    names = [last_component(layer.name) for layer in layers if layer.source == source]
    return ", ".join(dict.fromkeys(names))
