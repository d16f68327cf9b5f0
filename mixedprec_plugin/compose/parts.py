"""A layer's tensors that are made when they are read, and of them only the part that is.

Of N tensor-parallel ranks, each keeps a part of most tensors. Composed so, it reads and quantizes
little more than that part: whole words and whole scales.

    rank 1 of 2 keeps rows 64..127 of "qweight", then of "scales" and of "qzeros"
    -> rows 64..127 of the weight are read and quantized, once

A tensor that a rank does not keep at all, such as another rank's expert, is not made. Statistics
that span what is split are of the whole: an FP8 scale for a tensor, one for an output feature of a
layer that is split along its inputs. There each rank reads as far as they reach.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

from mixedprec_plugin.checkpoint.headers import StoredTensor
from mixedprec_plugin.checkpoint.reader import TORCH_DTYPES, Reader
from mixedprec_plugin.compose.cache import LayerCache
from mixedprec_plugin.compose.lazy import Box, LazyTensor
from mixedprec_plugin.compose.on_device import DeviceRounding
from mixedprec_plugin.compose.stream import (
    Quantize,
    Tensors,
    cast,
    compose_layer,
    compute,
    fit,
    plain_defaults,
    rescaling,
    round_to_nearest,
    take_as_stored,
)
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.methods.registry import METHODS
from mixedprec_plugin.methods.stored import StoredFormat, TensorSpec
from mixedprec_plugin.plan.model import PlannedLayer

# N, and half of K, that every group and block divides
_MANY = 45 << 14


class Cut(NamedTuple):
    """Of one dimension of a tensor: rows (0) or columns (1) of the weight in so many elements.

    The smallest numbers of both: 32 columns are 3 words of codes of 3 bits.
    """

    axis: int | None
    step: int
    elements: int = 1


Cuts = Mapping[str, tuple[Cut, ...]]

# what takes long to be made, and little to be kept
_KEPT = frozenset({"quantize", "requantize", "repack"})


def compose_parts(
    layer: PlannedLayer,
    target: Target,
    reader: Reader,
    cache: LayerCache | None = None,
    quantize: Quantize = round_to_nearest,
) -> Tensors:
    """As `compose_layer`, with a `LazyTensor` for what a part can be made of without the whole.

    The reader must stay open until they are read.

    Raises:
        CheckpointError: as `compose_layer`, then or where a tensor is read.
    """
    if layer.stored is None:
        return compose_layer(layer, target, reader, quantize)
    if layer.action in ("as stored", "cast") and not layer.stored.is_composed:
        return _as_stored(layer, target, reader)
    own = _own(layer.stored)
    others = {s: reader.read_finite(t) for s, t in layer.inputs.items() if s not in own}
    parts = _Parts(layer, target, reader, cache, quantize)
    return {
        suffix: fit(others[suffix], spec, f"{layer.name}.{suffix}")
        if suffix in others
        else parts.lazy(suffix, spec)
        for suffix, spec in layer.outputs.items()
    }


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
    made = {}
    for suffix, spec in layer.outputs.items():
        name, dtype, tensor = f"{layer.name}.{suffix}", TORCH_DTYPES[spec.dtype], taken[suffix]
        if isinstance(tensor, LazyTensor) and tensor.dtype != dtype and tensor.is_floating_point():
            tensor = tensor.then(functools.partial(cast, dtype=dtype, name=name), dtype)
        made[suffix] = fit(tensor, spec, name)
    return made


def _lazy(tensor: StoredTensor, reader: Reader) -> LazyTensor:
    box = tuple(range(size) for size in tensor.shape)
    return LazyTensor(functools.partial(reader.read_part, tensor), TORCH_DTYPES[tensor.dtype], box)


class _Parts:
    """What is made of parts of one layer's weight, each part once."""

    def __init__(
        self,
        layer: PlannedLayer,
        target: Target,
        reader: Reader,
        cache: LayerCache | None,
        quantize: Quantize,
    ) -> None:
        assert layer.stored is not None
        # of other packages' code it is not known when it changes
        is_own = METHODS[layer.method].codec.startswith("mixedprec_plugin.")
        self._cache = cache if layer.action in _KEPT and is_own else None
        self._layer, self._target, self._reader = layer, target, reader
        self._quantize = quantize
        self._device = quantize.device.type if isinstance(quantize, DeviceRounding) else "cpu"
        self._size = layer.stored.N, layer.stored.K
        self._inputs, self._outputs = _inputs_of(layer, layer.stored), _outputs_of(layer)
        self._tile = self._tile_of_both()
        self._made: dict[tuple[range, range] | None, Tensors] = {}

    def lazy(self, suffix: str, spec: TensorSpec) -> LazyTensor:
        box = tuple(range(size) for size in spec.shape)
        make = functools.partial(self._part, suffix, spec)
        return LazyTensor(make, TORCH_DTYPES[spec.dtype], box)

    def _tile_of_both(self) -> tuple[int, int] | None:
        """The rows and columns that no tensor is cut within; None where only the whole is made."""
        if self._inputs is None or self._outputs is None:
            return None
        tile = []
        for axis, size in enumerate(self._size):
            steps = [_step(cuts, axis) or 1 for cuts in self._inputs.values()]
            for cuts in self._outputs.values():
                # one for all rows or columns is a statistic of them
                steps += [] if axis == 0 and _is_index(cuts) else [_step(cuts, axis) or size]
            if axis == 1 and any(map(_is_index, self._inputs.values())):
                steps.append(size)
            tile.append(min(math.lcm(*steps), size) if size else 1)
        return tile[0], tile[1]

    def _part(self, suffix: str, spec: TensorSpec, box: Box) -> torch.Tensor:
        spans = self._spans(suffix, box)
        if spans not in self._made:
            self._made[spans] = self._kept(spans)
        made = self._made[spans][suffix]
        if spans is None:
            made = fit(made, spec, f"{self._layer.name}.{suffix}")
        elif made.is_floating_point():
            made = cast(made, TORCH_DTYPES[spec.dtype], f"{self._layer.name}.{suffix}")
        shifts = [0] * len(box)
        if spans is not None and self._outputs is not None:
            shifts = [
                spans[cut.axis].start // cut.step * cut.elements if cut.axis is not None else 0
                for cut in self._outputs[suffix]
            ]
        inside = [slice(r.start - n, r.stop - n) for r, n in zip(box, shifts, strict=True)]
        return made.reshape(()) if not box else made[tuple(inside)]

    def _spans(self, suffix: str, box: Box) -> tuple[range, range] | None:
        """The rows and columns of the weight that a part of a tensor is made of."""
        if self._tile is None or self._outputs is None:
            return None
        cuts = self._outputs[suffix]
        if _is_index(cuts):
            # what no row tells apart, such as the order of groups, any rows tell
            return range(min(self._tile[0], self._size[0])), range(self._size[1])
        spans = []
        for axis, (size, tile) in enumerate(zip(self._size, self._tile, strict=True)):
            wanted = range(size)
            for indices, cut in zip(box, cuts, strict=True):
                if cut.axis == axis:
                    first, last = indices.start // cut.elements, -(-indices.stop // cut.elements)
                    wanted = range(first * cut.step, last * cut.step)
            first = wanted.start // tile * tile
            spans.append(range(first, min(-(-wanted.stop // tile) * tile, size)))
        return spans[0], spans[1]

    def _kept(self, spans: tuple[range, range] | None) -> Tensors:
        layer, cache = self._layer, self._cache
        if cache is None or layer.scheme is None or layer.stored is None:
            return self._make(spans)
        inputs = [t for s, t in layer.inputs.items() if s in _own(layer.stored)]
        rescale = [] if layer.rescale is None else [layer.rescale.own, layer.rescale.served]
        key = cache.key(
            [*inputs, *rescale],
            action=layer.action,
            scheme=[layer.method, dict(layer.scheme.arguments)],
            stored=[layer.stored.codec, dict(layer.stored.how), layer.stored.factor],
            turns=layer.stored.turns,
            offset=layer.rescale.offset if layer.rescale else 0.0,
            dtype=self._target.dtype,
            spans=spans and [(span.start, span.stop) for span in spans],
            device=self._device,
        )
        found = cache.get(key) if key else None
        if found is None:
            found = self._make(spans)
            if key:
                told = {"model": str(inputs[0].path.parent), "layer": layer.name}
                cache.put(key, found, **told, scheme=layer.scheme.summary)
        return found

    def _make(self, spans: tuple[range, range] | None) -> Tensors:
        layer, reader = self._layer, self._reader
        assert layer.stored is not None
        with plain_defaults():
            stored = {}
            for suffix in _own(layer.stored):
                if suffix in layer.inputs:
                    tensor = layer.inputs[suffix]
                    stored[suffix] = (
                        reader.read_finite(tensor)
                        if spans is None or self._inputs is None or not tensor.shape
                        else reader.read_part(tensor, _box(tensor, self._inputs[suffix], spans))
                    )
            ratio = rescaling(layer.rescale, self._target, reader) if layer.rescale else None
            if ratio is not None and spans is not None:
                ratio = ratio[spans[1].start : spans[1].stop]
            return compute(layer, stored, self._target, self._quantize, ratio)


def _own(stored: StoredFormat) -> frozenset[str]:
    """The tensors that must be read together."""
    bias = {"bias"} if stored.turns_outputs else set()
    return (stored.suffixes or frozenset({"weight"})) | bias


def _box(tensor: StoredTensor, cuts: tuple[Cut, ...], spans: tuple[range, range]) -> Box:
    """The part of a stored tensor that some rows and columns of the weight are read from."""
    return tuple(
        range(size)
        if cut.axis is None
        else range(
            spans[cut.axis].start // cut.step * cut.elements,
            -(-spans[cut.axis].stop // cut.step) * cut.elements,
        )
        for size, cut in zip(tensor.shape, cuts, strict=True)
    )


def _inputs_of(layer: PlannedLayer, stored: StoredFormat) -> Cuts | None:
    """How stored tensors lie over the weight; None where that is not known."""
    if stored.is_plain:
        return _FLOATS
    method = METHODS.get(stored.method)
    if method is None or not method.quantizes_parts or stored.is_composed:
        return None
    arguments = {**method.defaults, **stored.arguments}
    own = {s: t.shape for s, t in layer.inputs.items() if s in stored.suffixes}
    specs = method.stored(arguments, stored.N, stored.K, "BF16")
    if any(s not in specs or specs[s].shape != shape for s, shape in own.items()):
        return None
    return _cuts(method.name, json.dumps(arguments))


def _outputs_of(layer: PlannedLayer) -> Cuts | None:
    """How a layer's method lays its tensors over the weight; None if it makes them of the whole."""
    if layer.is_unquantized:
        return _FLOATS
    assert layer.scheme is not None
    if not METHODS[layer.method].quantizes_parts:
        return None
    return _cuts(layer.method, json.dumps(dict(layer.scheme.arguments)))


@functools.lru_cache(maxsize=256)
def _cuts(method: str, arguments: str) -> Cuts:
    """Tell by what doubles where the weight does; arguments are JSON."""

    def specs(N: int, K: int) -> Mapping[str, TensorSpec]:
        return METHODS[method].stored(json.loads(arguments), N, K, "BF16")

    size = _MANY, 2 * _MANY
    once, higher, wider = specs(*size), specs(2 * size[0], size[1]), specs(size[0], 2 * size[1])
    found: dict[str, tuple[Cut, ...]] = {}
    for suffix, spec in once.items():
        grown = zip(spec.shape, higher[suffix].shape, wider[suffix].shape, strict=True)
        axes = [0 if n > now else 1 if k > now else None for now, n, k in grown]
        found[suffix] = tuple(
            Cut(None, 1) if axis is None else _cut(axis, size[axis], length)
            for axis, length in zip(axes, spec.shape, strict=True)
        )
    return found


def _cut(axis: int, size: int, length: int) -> Cut:
    common = math.gcd(size, length)
    return Cut(axis, size // common, length // common)


_FLOATS = {"weight": (Cut(0, 1), Cut(1, 1))}


def _step(cuts: tuple[Cut, ...], axis: int) -> int | None:
    return next((cut.step for cut in cuts if cut.axis == axis), None)


def _is_index(cuts: tuple[Cut, ...]) -> bool:
    """Whether a tensor tells columns apart and no rows, so that it follows from the shape."""
    return _step(cuts, 1) is not None and _step(cuts, 0) is None
