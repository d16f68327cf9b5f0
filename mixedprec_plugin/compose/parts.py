"""A layer's tensors that are made when they are read, and of them only the part that is.

Of N tensor-parallel ranks, each keeps a part of most tensors. Composed so, it reads and quantizes
little more than that part: whole words and whole scales.

    rank 1 of 2 keeps rows 64..127 of "qweight", then of "scales" and of "qzeros"
    -> rows 64..127 of the weight are read and quantized, once

Statistics that span what is split are of the whole: an FP8 scale for a tensor, one for an output
feature of a layer that is split along its inputs. There each rank reads as far as they reach.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

from mixedprec_plugin.checkpoint.headers import StoredTensor
from mixedprec_plugin.checkpoint.reader import TORCH_DTYPES, Reader
from mixedprec_plugin.compose.lazy import Box, LazyTensor
from mixedprec_plugin.compose.stream import (
    Tensors,
    cast,
    compose_layer,
    fit,
    plain_defaults,
    rescaling,
    round_to_nearest,
    take_as_stored,
)
from mixedprec_plugin.methods.interface import Method, Target
from mixedprec_plugin.methods.registry import METHODS
from mixedprec_plugin.methods.stored import TensorSpec
from mixedprec_plugin.plan.model import PlannedLayer
from mixedprec_plugin.preset.model import Scheme

# a multiple of every group and block that there is, for the rows; the columns are twice as many
_MANY = 45 << 14


def compose_parts(layer: PlannedLayer, target: Target, reader: Reader) -> Tensors:
    """As `compose_layer`, with `LazyTensor` wherever a part can be made without the whole.

    The reader must stay open until they are read.

    Raises:
        CheckpointError: as `compose_layer`, then or where a tensor is read.
    """
    stored = layer.stored
    if stored is None or stored.factor:
        return compose_layer(layer, target, reader)
    if layer.action in ("as stored", "cast"):
        return _as_stored(layer, target, reader)
    method = METHODS[layer.method]
    if layer.action == "quantize" and method.quantizes_parts:
        parts = _Parts(layer, method, target, reader)
        others = {s: reader.read_finite(t) for s, t in layer.inputs.items() if s != "weight"}
        return {
            suffix: fit(others[suffix], spec, f"{layer.name}.{suffix}")
            if suffix in others
            else parts.lazy(suffix, spec)
            for suffix, spec in layer.outputs.items()
        }
    return compose_layer(layer, target, reader)


def _as_stored(layer: PlannedLayer, target: Target, reader: Reader) -> Tensors:
    """What is largest is read in parts; the rest tells what is wrong with the whole."""
    most = max(tensor.num_bytes for tensor in layer.inputs.values())
    stored = {
        suffix: _lazy(tensor, reader)
        if tensor.shape and tensor.num_bytes == most
        else reader.read_finite(tensor)
        for suffix, tensor in layer.inputs.items()
    }
    with plain_defaults():
        taken = take_as_stored(layer, stored, target)
    return {
        suffix: _fit(taken[suffix], spec, f"{layer.name}.{suffix}")
        for suffix, spec in layer.outputs.items()
    }


def _lazy(tensor: StoredTensor, reader: Reader) -> LazyTensor:
    box = tuple(range(size) for size in tensor.shape)
    return LazyTensor(functools.partial(reader.read_part, tensor), TORCH_DTYPES[tensor.dtype], box)


def _fit(tensor: torch.Tensor, spec: TensorSpec, name: str) -> torch.Tensor:
    dtype = TORCH_DTYPES[spec.dtype]
    if isinstance(tensor, LazyTensor) and tensor.dtype != dtype and tensor.is_floating_point():
        tensor = tensor.then(functools.partial(cast, dtype=dtype, name=name), dtype)
    return fit(tensor, spec, name)


class _Parts:
    """A weight of floats and what its method makes of parts of it, each part once."""

    def __init__(self, layer: PlannedLayer, method: Method, target: Target, reader: Reader) -> None:
        assert layer.stored is not None
        assert layer.scheme is not None
        self._layer, self._target, self._reader = layer, target, reader
        self._size = layer.stored.N, layer.stored.K
        self._cuts, self._tile = _cut(method, layer.scheme, target.dtype)
        self._made: dict[tuple[range, range], Tensors] = {}

    def lazy(self, suffix: str, spec: TensorSpec) -> LazyTensor:
        """Stand for one of the method's tensors."""
        box = tuple(range(size) for size in spec.shape)
        return LazyTensor(functools.partial(self._part, suffix), TORCH_DTYPES[spec.dtype], box)

    def _part(self, suffix: str, box: Box) -> torch.Tensor:
        cuts = self._cuts[suffix]
        spans = self._spans(suffix, box)
        if spans not in self._made:
            self._made[spans] = self._quantize(*spans)
        made = self._made[spans][suffix]
        inside = [
            slice(indices.start - shift, indices.stop - shift)
            for indices, cut in zip(box, cuts, strict=True)
            for shift in [spans[cut.axis].start // cut.step if cut.axis is not None else 0]
        ]
        return made[tuple(inside)]

    def _spans(self, suffix: str, box: Box) -> tuple[range, range]:
        """The rows and columns of the weight that a part of a tensor is made of."""
        cuts = self._cuts[suffix]
        if _is_index(cuts):
            # what no row tells apart, such as the order of groups, any rows tell
            return range(min(self._tile[0], self._size[0])), range(self._size[1])
        spans = []
        for axis, (size, tile) in enumerate(zip(self._size, self._tile, strict=True)):
            wanted = range(size)
            for indices, cut in zip(box, cuts, strict=True):
                if cut.axis == axis:
                    wanted = range(indices.start * cut.step, indices.stop * cut.step)
            first = wanted.start // tile * tile
            spans.append(range(first, min(-(-wanted.stop // tile) * tile, size)))
        return spans[0], spans[1]

    def _quantize(self, rows: range, columns: range) -> Tensors:
        with plain_defaults():
            weight = self._reader.read_part(self._layer.inputs["weight"], (rows, columns))
            if self._layer.rescale is not None:
                ratio = rescaling(self._layer.rescale, self._target, self._reader)
                weight = weight.float() * ratio[columns.start : columns.stop]
            return round_to_nearest(self._layer, weight, self._target)


class _Cut(NamedTuple):
    """Of one dimension of a stored tensor: rows (0) or columns (1) of the weight an element."""

    axis: int | None
    step: int


def _is_index(cuts: tuple[_Cut, ...]) -> bool:
    """Whether a tensor tells columns apart and no rows, so that it follows from the shape."""
    axes = {cut.axis for cut in cuts}
    return 1 in axes and 0 not in axes


def _cut(
    method: Method, scheme: Scheme, dtype: str
) -> tuple[Mapping[str, tuple[_Cut, ...]], tuple[int, int]]:
    """How a method's tensors lie over a weight, and the rows and columns that none is cut within.

    Told by what doubles where the weight does.
    """

    def shapes(N: int, K: int) -> Mapping[str, TensorSpec]:
        return method.stored(scheme.arguments, N, K, dtype)

    size = _MANY, 2 * _MANY
    once, higher, wider = shapes(*size), shapes(2 * size[0], size[1]), shapes(size[0], 2 * size[1])
    cuts: dict[str, tuple[_Cut, ...]] = {}
    for suffix, spec in once.items():
        grown = zip(spec.shape, higher[suffix].shape, wider[suffix].shape, strict=True)
        axes = [0 if n > now else 1 if k > now else None for now, n, k in grown]
        cuts[suffix] = tuple(
            _Cut(axis, 1 if axis is None else size[axis] // length)
            for axis, length in zip(axes, spec.shape, strict=True)
        )
    tile = []
    for axis in (0, 1):
        steps = [
            next((cut.step for cut in of if cut.axis == axis), size[axis])
            for of in cuts.values()
            if axis == 1 or not _is_index(of)
        ]
        tile.append(math.lcm(*steps))
    return cuts, (tile[0], tile[1])
