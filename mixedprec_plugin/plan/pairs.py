"""Layers whose columns may make up for another layer's rows: up -> down, v -> o.

AWQ and its kin divide the rows of up_proj and multiply the columns of down_proj, which no norm
shows. `mixedprec convert --fold` marks in config.json where it did so. Where the two come from
different sources and no mark tells, the rows of the producer are compared between the
sources: behind their own norms, they are the same but for quantization, or scaled row by row.

For every row, c = <a, b> / <b, b> is the scale between the sources, e the relative error that is
left. A scale that no tool folded is noise, about e / sqrt(K), and what clipping takes away, less
than 0.35 e. So rows count as folded where c deviates by more than a quarter of e, or its median is
off by more than half of e, but never within 1%. Between any two of 15 checkpoints of a layer of
SmolLM2, where nothing was folded, they stay below 0.5 and 0.67 of these limits; AutoAWQ's folded
up_proj is 8 and 16 times over them.

This is the one part of a plan that needs torch, and reads whole layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from mixedprec_plugin.checkpoint.headers import StoredTensor
from mixedprec_plugin.checkpoint.source import Source
from mixedprec_plugin.checkpoint.values import Values
from mixedprec_plugin.errors import Problem, ShapeError
from mixedprec_plugin.families.names import last_component
from mixedprec_plugin.families.wiring import producers
from mixedprec_plugin.methods.recognition import FormatCache
from mixedprec_plugin.methods.stored import StoredFormat
from mixedprec_plugin.plan.folding import fold_problems
from mixedprec_plugin.plan.model import PlannedLayer

if TYPE_CHECKING:
    import torch

# columns that are compared where reading fewer is cheaper: noise of c is about e / sqrt(columns)
_NUM_COLUMNS = 512
_LEAST = 0.01


@dataclasses.dataclass(frozen=True)
class RowScales:
    """How the rows of one matrix relate to another's.

    Attributes:
        median: of the rows' scales c; NaN where no row is like its counterpart.
        deviation: standard deviation of c.
        error: median of the relative errors e that scales leave.
        is_related: whether most rows point the same way (cosine over 0.7).
    """

    median: float
    deviation: float
    error: float
    is_related: bool

    @property
    def is_folded(self) -> bool:
        """Whether rows are scaled beyond what quantization does."""
        return self.deviation > max(_LEAST, 0.25 * self.error) or abs(self.median - 1) > max(
            _LEAST, 0.5 * self.error
        )


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Compares the rows of producers between sources.

    Attributes:
        layers: layer name -> layer, as planned.
        norms: layer name -> the norm whose output it reads.
        offset: what a norm adds to its weight before it scales.
        trusted: whether a producer that cannot be compared counts as the same.
    """

    layers: Mapping[str, PlannedLayer]
    sources: Mapping[str, Source]
    norms: Mapping[str, str]
    offset: float
    values: Values
    formats: FormatCache
    trusted: bool

    def check(self) -> list[Problem]:
        """Find consumers that are right only behind the producer of their own source.

        Raises:
            CheckpointError: a layer cannot be read.
        """
        problems = []
        for producer, consumer in producers(self.layers, self.sources["model"].config):
            made, reads = self.layers[producer].source, self.layers[consumer].source
            if made == reads or self.sources[made].path == self.sources[reads].path:
                continue
            if reason := self._why_wrong(producer, made, reads):
                first, last = last_component(producer), last_component(consumer)
                what = (
                    f"comes from {reads!r} and is right only behind its own {first}, which comes "
                    f"from {made!r}: {reason}"
                )
                remedy = f"take {first} and {last} from one source"
                problems.append(Problem(consumer, what, remedy, "coupled-layers"))
        return fold_problems(problems)

    def _why_wrong(self, producer: str, first: str, second: str) -> str:
        for source in (first, second):
            if producer in self.sources[source].folded:
                return f"{source!r} is marked to have scales folded between the two"
        found = self._compare(producer, first, second)
        if isinstance(found, str):
            return "" if self.trusted else found
        if not found.is_related:
            return "their weights are unrelated"
        return "the rows of the two are scaled differently" if found.is_folded else ""

    def _compare(self, producer: str, first: str, second: str) -> RowScales | str:
        """The scales between a layer's rows, each behind its own norm; or why nothing tells."""
        matrices = []
        for name in (first, second):
            source, last = self.sources[name], last_component(producer)
            if producer not in source.layers:
                return f"{name!r} holds no {last} to compare"
            stored = self.formats.of(source, producer)
            if stored is None or not stored.is_readable:
                return f"{name!r} stores its {last} in a format we do not read"
            matrices.append(_dequantize(source, producer, stored))
        one, other = matrices
        if len(one) != len(other):
            return f"it has {len(one)} and {len(other)} rows"
        num_columns = min(one.shape[1], other.shape[1])
        one, other = one[:, :num_columns], other[:, :num_columns]
        scale = self._column_scale(producer, first, second)
        if scale is None:
            return row_scales(one, other)
        scale = scale[:num_columns]
        return row_scales(one * scale, other * scale.reciprocal().nan_to_num(posinf=0.0))

    def _column_scale(self, producer: str, first: str, second: str) -> torch.Tensor | None:
        """The square root of one source's norm over another's, [K]; 0 where either is 0.

        Half of the difference for each side: as a whole, an uneven norm leaves few columns to
        average the noise over.
        """
        import numpy as np
        import torch

        norm = self.norms.get(producer, "")
        tensors = [self.sources[s].layers.get(norm, {}).get("weight") for s in (first, second)]
        if tensors[0] is None or tensors[1] is None:
            return None
        one = np.abs(self.values.of(tensors[0]) + self.offset)
        other = np.abs(self.values.of(tensors[1]) + self.offset)
        if one.shape != other.shape or np.array_equal(one, other):
            return None
        ratio = np.divide(one, other, out=np.zeros_like(one), where=other != 0)
        return torch.from_numpy(np.sqrt(ratio))


def row_scales(first: torch.Tensor, second: torch.Tensor) -> RowScales:
    """Measure the scale between the rows of two matrices, float32 [N, K], that are related.

    Rows that are zero in both say nothing.
    """
    import torch

    dot = torch.linalg.vecdot(first, second).double()
    squares = [torch.linalg.vecdot(x, x).double() for x in (first, second)]
    is_used = (squares[0] > 0) | (squares[1] > 0)
    is_whole = (squares[0] > 0) & (squares[1] > 0)
    cosine = dot[is_whole] / (squares[0] * squares[1])[is_whole].sqrt()
    is_related = cosine > 0.7
    num_related = int(is_related.sum())
    if 2 * num_related <= int(is_used.sum()) or not num_related:
        return RowScales(math.nan, math.nan, math.nan, not bool(is_used.any()))
    scales = (dot / squares[1])[is_whole][is_related]
    errors = (1 - cosine[is_related].clamp(max=1).square()).sqrt()
    return RowScales(
        float(scales.median()), float(scales.std(correction=0)), float(errors.median()), True
    )


def _dequantize(source: Source, name: str, stored: StoredFormat) -> torch.Tensor:
    """Read a layer's weight, float32 [N, K]; only leading columns where that is cheaper."""
    from mixedprec_plugin.checkpoint.reader import Reader

    tensors: Mapping[str, StoredTensor] = {**source.layers[name], **stored.matrices}
    # these store K first, so that leading columns are leading rows of the file
    if "qweight" in stored.suffixes and not stored.turns:
        tensors = _leading_columns(tensors, stored)
    with Reader() as reader:
        read = {suffix: reader.read(tensors[suffix]) for suffix in tensors if suffix != "bias"}
    if stored.is_plain:
        return read["weight"][:, :_NUM_COLUMNS].float()
    try:
        return stored.dequantize(read)
    except ShapeError as error:
        raise ShapeError(Problem(name, str(error))) from error


def _leading_columns(
    tensors: Mapping[str, StoredTensor], stored: StoredFormat
) -> Mapping[str, StoredTensor]:
    """The tensors of the first input features, whole groups; all where order is by activation."""
    import numpy as np

    group_size, K = int(stored.how["group_size"]), stored.K
    num_columns = -(-_NUM_COLUMNS // group_size) * group_size if group_size > 0 else K
    if num_columns >= K:
        return tensors
    if g_idx := tensors.get("g_idx"):
        order = Values().of(g_idx)
        if not np.array_equal(order, np.arange(len(order)) // group_size):
            return tensors
    return {
        suffix: tensor._replace(
            shape=(rows := tensor.shape[0] * num_columns // K, *tensor.shape[1:]),
            num_bytes=tensor.num_bytes // tensor.shape[0] * rows,
            part_of=tensor,
        )
        for suffix, tensor in tensors.items()
        if suffix in stored.suffixes
    }
