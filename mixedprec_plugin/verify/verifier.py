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
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from mixedprec_plugin.checkpoint.reader import Reader
from mixedprec_plugin.checkpoint.recorded import damage
from mixedprec_plugin.checkpoint.source import Source, open_source
from mixedprec_plugin.compose.stream import (
    Tensors,
    compose_layer,
    in_file_order,
    plain_defaults,
    served_floats,
)
from mixedprec_plugin.errors import CheckpointError
from mixedprec_plugin.families.config import sizes
from mixedprec_plugin.families.table import family_of
from mixedprec_plugin.families.wiring import coupled_units, producers
from mixedprec_plugin.methods.recognition import FormatCache
from mixedprec_plugin.methods.registry import METHODS, UNQUANTIZED
from mixedprec_plugin.plan.heads import with_heads
from mixedprec_plugin.plan.model import Plan, PlannedLayer
from mixedprec_plugin.verify.distance import Columns, Distance, distance, row_factors
from mixedprec_plugin.verify.thresholds import threshold_of


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How far one layer is from its reference.

    Attributes:
        layer: layer name, and for what is no weight matrix the tensor's suffix behind it.
        distance: None where it was not compared.
        limit: largest relative error.
        note: how it was compared, or why it was not; empty where weight and weight were.
        usual: relative error of a normally distributed weight rounded by the layer's scheme; 0
            where it was not rounded, or where that is not known.
    """

    layer: str
    method: str
    source: str
    distance: Distance | None
    limit: float
    note: str
    usual: float = 0.0

    @property
    def is_too_far(self) -> bool:
        """Whether the layer is over its limit; a NaN is."""
        return self.distance is not None and not self.distance.relative_error <= self.limit


def reference_of(named: str, plan: Plan) -> Source:
    """Open a reference: one of the plan's sources, or a checkpoint folder.

    Raises:
        CheckpointError: it is neither, or damaged.
    """
    if named in plan.sources and not Path(named).is_dir():
        return plan.sources[named]
    return open_source(named, "reference")


def check_recorded(plan: Plan, reference: Source) -> None:
    """Hold every byte of converted checkpoints against the digests that they carry.

    Raises:
        CheckpointError: with every file that is not what was written.
    """
    folders = {source.path: None for source in (*plan.sources.values(), reference)}
    if problems := [p for folder in folders for p in damage(folder, digests=True)]:
        raise CheckpointError(problems)


class Verifier:
    """Compares the layers of a plan with a reference, each by itself.

    Args:
        reference: a checkpoint of the same model, in any format that we can dequantize.
        limits: method -> largest relative error; others have their own.
    """

    def __init__(
        self, plan: Plan, reference: Source, limits: Mapping[str, float], reader: Reader
    ) -> None:
        kinds = {layer.name: layer.kind for layer in plan.layers}
        self.plan, self.limits, self.reader = plan, limits, reader
        self.reference = with_heads(reference, kinds)
        self._formats = FormatCache()
        units = coupled_units(kinds, plan.tied, plan.source.config)
        self._norms = {name: unit.norm for unit in units for name in unit.consumers}
        self._with_consumers = {unit.norm for unit in units if unit.consumers}
        pairs = producers(plan.by_name, plan.source.config)
        self._producers = {consumer: producer for producer, consumer in pairs}
        self._consumers = dict(pairs)
        self._exact = METHODS[UNQUANTIZED].rounding(METHODS[UNQUANTIZED].defaults).limit
        self._norm_columns = functools.lru_cache(maxsize=64)(self._read_norm_columns)

    def compare_all(self) -> list[Comparison]:
        """Compose every layer and compare it, in the order of the files."""
        layers = in_file_order(self.plan.layers)
        return [one for layer in layers for one in self.compare(layer, self._compose(layer))]

    def compare(self, layer: PlannedLayer, outputs: Tensors) -> Iterator[Comparison]:
        """Compare one composed layer: its weight matrix, and every other float beside it.

        Args:
            outputs: parameter suffix -> what is served; not modified.
        Raises:
            CheckpointError, ShapeError: a reference is damaged.
        """
        with plain_defaults():
            stored = self.reference.layers.get(layer.name)
            if stored is None:
                yield self._result(layer, None, "not in the reference")
                return
            if layer.num_weights:
                yield self._compare_matrix(layer, outputs)
            for suffix, tensor in outputs.items():
                is_beside = not layer.num_weights or suffix == "bias"
                if is_beside and suffix in stored and tensor.is_floating_point():
                    reference = self.reader.read(stored[suffix])
                    yield self._compare_beside(layer, suffix, tensor, reference)

    def _result(self, layer: PlannedLayer, distance: Distance | None, note: str) -> Comparison:
        limit = threshold_of(layer, self.limits)
        usual = 0.0
        if layer.scheme is not None and layer.stored is not None and layer.action == "quantize":
            rounding = METHODS[layer.method].rounding(layer.scheme.arguments)
            usual = rounding.error(layer.stored.N, layer.stored.K)
        return Comparison(layer.name, layer.method, layer.source, distance, limit, note, usual)

    def _compare_beside(
        self, layer: PlannedLayer, suffix: str, tensor: torch.Tensor, reference: torch.Tensor
    ) -> Comparison:
        name = layer.tensor_name(suffix)
        if reference.shape != tensor.shape:
            result = self._result(layer, None, _shapes(tensor, reference))
            return dataclasses.replace(result, layer=name)
        far = distance(tensor, reference)
        result = dataclasses.replace(self._result(layer, far, ""), layer=name)
        if layer.name not in self._with_consumers or not far.relative_error > 0:
            return result
        note = "folded: judged with the layers behind it"
        return dataclasses.replace(result, limit=float("inf"), note=note)

    def _compare_matrix(self, layer: PlannedLayer, outputs: Tensors) -> Comparison:
        weight, reference = self._served(layer, outputs), self._reference(layer.name)
        if weight is None or reference is None:
            where = "what is served" if weight is None else "the reference's format"
            return self._result(layer, None, f"{where} cannot be dequantized")
        if weight.shape != reference.shape:
            return self._result(layer, None, _shapes(weight, reference))
        columns = self._norm_columns(self._norms.get(layer.name))
        note = "with its norm" if columns else ""
        plain = self._result(layer, distance(weight, reference, columns), note)
        if columns and distance(*columns).relative_error > self._exact:
            # a layer that does not make up for its norm is nearer without it, however coarse it is
            alone = max(self._exact, distance(weight, reference).relative_error)
            plain = dataclasses.replace(plain, limit=min(plain.limit, alone))
        if not plain.is_too_far:
            return plain
        for other in (self._but_for_rows, self._but_for_columns):
            tried = other(layer, weight, reference, columns)
            if tried is not None and not tried.is_too_far:
                return tried
        return plain

    def _but_for_rows(
        self, layer: PlannedLayer, weight: torch.Tensor, reference: torch.Tensor,
        columns: Columns | None,
    ) -> Comparison | None:  # fmt: skip
        """Take a producer for folded if its consumer makes up for the factors of its rows."""
        consumer = self.plan.by_name.get(self._consumers.get(layer.name, ""))
        pair = self._pair(consumer)
        if consumer is None or pair is None:
            return None
        factors = row_factors(weight, reference, columns)
        spread = self._spread(factors, pair[0].shape[1])
        if spread is None:
            return None
        made_up, plain = (distance(*pair, own).relative_error for own in (spread, None))
        # a consumer that knows nothing of them is further away with them, if within its limit
        if made_up >= plain or made_up > threshold_of(consumer, self.limits):
            return None
        far = distance(weight, reference, columns, factors)
        return self._result(layer, far, f"with {consumer.name}")

    def _but_for_columns(
        self, layer: PlannedLayer, weight: torch.Tensor, reference: torch.Tensor,
        columns: Columns | None,
    ) -> Comparison | None:  # fmt: skip
        """Make up for the factors of the rows of the layer before."""
        producer = self.plan.by_name.get(self._producers.get(layer.name, ""))
        pair = self._pair(producer) if columns is None else None
        if producer is None or pair is None:
            return None
        factors = row_factors(*pair, self._norm_columns(self._norms.get(producer.name)))
        spread = self._spread(factors, weight.shape[1])
        far = spread and distance(weight, reference, spread)
        return self._result(layer, far, f"with {producer.name}") if far else None

    def _pair(self, layer: PlannedLayer | None) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What a neighbour is served as, and its reference; None where they do not compare."""
        if layer is None:
            return None
        weight, reference = self._served(layer, self._compose(layer)), self._reference(layer.name)
        if weight is None or reference is None or weight.shape != reference.shape:
            return None
        return weight, reference

    def _spread(self, factors: torch.Tensor, K: int) -> Columns | None:
        """Factors of v's rows for o's columns: every key-value head serves several query heads."""
        if len(factors) != K:
            num_heads = int(sizes(self.plan.source.config).get("num_key_value_heads", 0))
            if not num_heads or len(factors) % num_heads or K % len(factors):
                return None
            heads = factors.view(num_heads, -1).repeat_interleave(K // len(factors), dim=0)
            factors = heads.reshape(-1)
        return factors, torch.ones(())

    def _read_norm_columns(self, norm: str | None) -> Columns | None:
        """A norm as it is served and as the reference has it; None where they are one."""
        offset = family_of(self.plan.source.config).norm_offset
        if norm is None or offset is None:
            return None
        stored = self.reference.layers.get(norm, {})
        if "weight" not in stored:
            return None
        served = self._compose(self.plan.by_name[norm]).get("weight")
        own = self.reader.read(stored["weight"])
        if served is None or served.dim() != 1 or served.shape != own.shape:
            return None
        if torch.equal(served, own.to(served.dtype)):
            return None
        return served.double() + offset, own.double() + offset

    def _compose(self, layer: PlannedLayer) -> Tensors:
        return compose_layer(layer, self.plan.target, self.reader)

    def _served(self, layer: PlannedLayer, outputs: Tensors) -> torch.Tensor | None:
        weight = served_floats(layer, outputs).get("weight")
        is_read = weight is not None and weight.is_floating_point() and weight.itemsize > 1
        return weight if is_read else None

    def _reference(self, name: str) -> torch.Tensor | None:
        """The reference's weight as floats [N, K]."""
        stored = self._formats.of(self.reference, name)
        if stored is None or not stored.is_readable:
            return None
        tensors = {**self.reference.layers[name], **stored.matrices}
        if stored.is_plain:
            return self.reader.read(tensors["weight"])
        return stored.dequantize({s: self.reader.read(tensors[s]) for s in stored.suffixes})


def _shapes(weight: torch.Tensor, reference: torch.Tensor) -> str:
    return f"is {list(weight.shape)}, the reference {list(reference.shape)}"
