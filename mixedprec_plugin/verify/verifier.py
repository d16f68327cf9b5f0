"""One composed layer against its reference, scales that were folded into a neighbour taken out.

A tool that folds scales changes a layer and what comes before it, so that their product stays: the
columns of a layer and its norm, or the columns of a layer and the rows of the one before it (`up`
and `down`, `v` and `o`). A layer whose norm is not the reference's is compared together with it.
One that is too far from its reference all the same is compared but for a factor a row, if the layer
that reads it makes up for these factors, and one that reads such a layer but for its columns'.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping

import torch

from mixedprec_plugin.checkpoint.reader import Reader
from mixedprec_plugin.checkpoint.source import Source
from mixedprec_plugin.compose.order import in_file_order
from mixedprec_plugin.compose.stream import Tensors, compose_layer, plain_defaults
from mixedprec_plugin.families.config import sizes
from mixedprec_plugin.families.table import family_of
from mixedprec_plugin.families.wiring import coupled_units, producers
from mixedprec_plugin.methods import registry
from mixedprec_plugin.methods.recognition import FormatCache
from mixedprec_plugin.plan.model import Plan, PlannedLayer
from mixedprec_plugin.quantize.codec import load_codec
from mixedprec_plugin.verify.distance import Distance, distance, row_factors
from mixedprec_plugin.verify.thresholds import threshold_of

Columns = tuple[torch.Tensor, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How far one layer is from its reference.

    Attributes:
        layer: layer name, and for what is no weight matrix the tensor's suffix behind it.
        method: what it runs in.
        source: name of the source that it comes from.
        distance: None where it was not compared.
        limit: largest relative error.
        note: how it was compared, or why it was not; empty where weight and weight were.
    """

    layer: str
    method: str
    source: str
    distance: Distance | None
    limit: float
    note: str = ""

    @property
    def is_too_far(self) -> bool:
        """Whether the layer is over its limit; a NaN is."""
        return self.distance is not None and not self.distance.relative_error <= self.limit


class Verifier:
    """Compares the layers of a plan with a reference, each by itself.

    Args:
        plan: a plan without errors.
        reference: a checkpoint of the same model, in any format that we can dequantize.
        limits: method -> largest relative error; others have their own.
    """

    def __init__(self, plan: Plan, reference: Source, limits: Mapping[str, float]) -> None:
        self.plan, self.reference, self.limits = plan, reference, limits
        self._formats = FormatCache()
        kinds = {layer.name: layer.kind for layer in plan.layers}
        units = coupled_units(kinds, plan.tied, plan.source.config)
        self._norms = {name: unit.norm for unit in units for name in unit.consumers}
        self._with_consumers = {unit.norm for unit in units if unit.consumers}
        pairs = producers(plan.by_name, plan.source.config)
        self._producers = {consumer: producer for producer, consumer in pairs}
        self._consumers = dict(pairs)
        self._norm_columns = functools.lru_cache(maxsize=64)(self._read_norm_columns)
        self.reader = Reader()

    def close(self) -> None:
        """Close all files."""
        self.reader.close()

    def compare_all(self, progress: Callable[[int], None] = lambda _: None) -> list[Comparison]:
        """Compose every layer and compare it, in the order of the files."""
        found: list[Comparison] = []
        for layer in in_file_order(self.plan):
            outputs = compose_layer(layer, self.plan.target, self.reader)
            found.extend(self.compare(layer, outputs))
            progress(layer.bytes_before)
        return found

    def compare(self, layer: PlannedLayer, outputs: Tensors) -> Iterator[Comparison]:
        """Compare one composed layer: its weight matrix, and every other float beside it.

        Args:
            outputs: parameter suffix -> what is served; not modified.
        Raises:
            CheckpointError, ShapeError: a reference is damaged.
        """
        with plain_defaults():
            make = functools.partial(
                Comparison, method=layer.method, source=layer.source,
                limit=threshold_of(layer, self.limits),
            )  # fmt: skip
            stored = self.reference.layers.get(layer.name)
            if stored is None:
                yield make(layer=layer.name, distance=None, note="not in the reference")
                return
            if layer.num_weights:
                yield self._compare_matrix(layer, outputs, make)
            for suffix, tensor in outputs.items():
                is_beside = not layer.num_weights or suffix == "bias"
                if not is_beside or suffix not in stored or not tensor.is_floating_point():
                    continue
                name = f"{layer.name}.{suffix}" if layer.name else suffix
                reference = self.reader.read(stored[suffix])
                if reference.shape != tensor.shape:
                    yield make(layer=name, distance=None, note=_shapes(tensor, reference))
                    continue
                far = distance(_matrix(tensor), _matrix(reference))
                is_folded = layer.name in self._with_consumers and far.relative_error > 0
                note = "folded: judged with the layers behind it" if is_folded else ""
                limit = float("inf") if is_folded else make.keywords["limit"]
                yield dataclasses.replace(make(layer=name, distance=far, note=note), limit=limit)

    def _compare_matrix(
        self, layer: PlannedLayer, outputs: Tensors, make: Callable[..., Comparison]
    ) -> Comparison:
        weight, reference = self._served(layer, outputs), self._reference(layer.name)
        if weight is None or reference is None:
            where = "what is served" if weight is None else "the reference's format"
            return make(layer=layer.name, distance=None, note=f"{where} cannot be dequantized")
        if weight.shape != reference.shape:
            return make(layer=layer.name, distance=None, note=_shapes(weight, reference))
        norm, columns = self._norms.get(layer.name), None
        note = ""
        if norm is not None and (columns := self._norm_columns(norm)) is not None:
            note = "with its norm"
        plain = make(layer=layer.name, distance=distance(weight, reference, columns), note=note)
        if not plain.is_too_far:
            return plain
        for other in (self._but_for_rows, self._but_for_columns):
            tried = other(layer, weight, reference, columns)
            if tried is not None and not (found := make(
                layer=layer.name, distance=tried[0], note=tried[1]
            )).is_too_far:  # fmt: skip
                return found
        return plain

    def _but_for_rows(
        self, layer: PlannedLayer, weight: torch.Tensor, reference: torch.Tensor,
        columns: Columns | None,
    ) -> tuple[Distance, str] | None:  # fmt: skip
        """Take a producer for folded if its consumer makes up for the factors of its rows."""
        consumer = self.plan.by_name.get(self._consumers.get(layer.name, ""))
        if consumer is None:
            return None
        factors = row_factors(weight, reference, columns)
        made_up = self._consumer_distance(consumer, factors)
        if made_up is None or made_up.relative_error > threshold_of(consumer, self.limits):
            return None
        return distance(weight, reference, columns, factors), f"with {consumer.name}"

    def _but_for_columns(
        self, layer: PlannedLayer, weight: torch.Tensor, reference: torch.Tensor,
        columns: Columns | None,
    ) -> tuple[Distance, str] | None:  # fmt: skip
        """Make up for the factors of the rows of the layer before."""
        producer = self.plan.by_name.get(self._producers.get(layer.name, ""))
        if producer is None or columns is not None:
            return None
        before = self._served(producer, self._compose(producer))
        before_reference = self._reference(producer.name)
        if before is None or before_reference is None or before.shape != before_reference.shape:
            return None
        norm = self._norms.get(producer.name)
        factors = row_factors(before, before_reference, self._norm_columns(norm) if norm else None)
        spread = self._spread(factors, weight.shape[1])
        if spread is None:
            return None
        return distance(weight, reference, (spread, torch.ones(()))), f"with {producer.name}"

    def _consumer_distance(self, consumer: PlannedLayer, factors: torch.Tensor) -> Distance | None:
        weight = self._served(consumer, self._compose(consumer))
        reference = self._reference(consumer.name)
        if weight is None or reference is None or weight.shape != reference.shape:
            return None
        spread = self._spread(factors, weight.shape[1])
        return None if spread is None else distance(weight, reference, (spread, torch.ones(())))

    def _spread(self, factors: torch.Tensor, K: int) -> torch.Tensor | None:
        """Factors of v's rows for o's columns: every key-value head serves several query heads."""
        if len(factors) == K:
            return factors
        num_heads = int(sizes(self.plan.source.config).get("num_key_value_heads", 0))
        if not num_heads or len(factors) % num_heads or K % len(factors):
            return None
        repeated = factors.view(num_heads, -1).repeat_interleave(K // len(factors), dim=0)
        return repeated.reshape(-1)

    def _read_norm_columns(self, norm: str) -> Columns | None:
        """A norm as it is served and as the reference has it; None where they are one."""
        layer, stored = self.plan.by_name[norm], self.reference.layers.get(norm, {})
        offset = family_of(self.plan.source.config).norm_offset
        if offset is None or "weight" not in stored:
            return None
        served, own = self._compose(layer).get("weight"), self.reader.read(stored["weight"])
        if served is None or served.dim() != 1 or served.shape != own.shape:
            return None
        if torch.equal(served, own.to(served.dtype)):
            return None
        return served.double() + offset, own.double() + offset

    def _compose(self, layer: PlannedLayer) -> Tensors:
        return compose_layer(layer, self.plan.target, self.reader)

    def _served(self, layer: PlannedLayer, outputs: Tensors) -> torch.Tensor | None:
        """What a layer is served as, as floats [N, K]."""
        if layer.scheme is None or layer.is_unquantized:
            weight = outputs.get("weight")
            return weight if weight is not None and weight.dtype.itemsize > 1 else None
        lazy, arguments = registry.METHODS[layer.method].codec, layer.scheme.arguments
        if not lazy and layer.stored is not None:
            lazy, arguments = layer.stored.codec, layer.stored.how
        return load_codec(lazy).read(outputs, arguments).dequantize() if lazy else None

    def _reference(self, name: str) -> torch.Tensor | None:
        """The reference's weight as floats [N, K]."""
        stored = self._formats.of(self.reference, name)
        if stored is None:
            return None
        tensors = self.reference.layers[name]
        if stored.is_float:
            return self.reader.read(tensors["weight"])
        read = {s: self.reader.read(t) for s, t in tensors.items() if s in stored.suffixes}
        if not stored.codec:
            return None
        return load_codec(stored.codec).read(read, stored.how).dequantize()


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(1, -1) if tensor.dim() < 2 else tensor


def _shapes(weight: torch.Tensor, reference: torch.Tensor) -> str:
    return f"is {list(weight.shape)}, the reference {list(reference.shape)}"
