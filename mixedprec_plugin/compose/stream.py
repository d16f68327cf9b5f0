"""The virtual checkpoint: the tensors of a plan, one by one, as they would stand on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator

import torch

from mixedprec_plugin.checkpoint.reader import AS_USUAL, DTYPE_NAMES, TORCH_DTYPES, Reader, Reading
from mixedprec_plugin.errors import CheckpointError, Problem, ShapeError
from mixedprec_plugin.methods.cards import to_dequantize
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.methods.registry import METHODS
from mixedprec_plugin.methods.stored import TensorSpec
from mixedprec_plugin.plan.model import Plan, PlannedLayer, Rescale
from mixedprec_plugin.quantize.codec import NotTheSameNumbersError, load_codec

Tensors = dict[str, torch.Tensor]
# (tensor name, tensor), one by one
Weights = Iterator[tuple[str, torch.Tensor]]
Quantize = Callable[[PlannedLayer, torch.Tensor, Target], Tensors]
Compose = Callable[[PlannedLayer, Target, Reader], Tensors]

# above, a layer is read while the model's memory is still empty: it is there twice
_LARGE_BYTES = 32 << 20


class VirtualCheckpoint:
    """Iterates over (tensor name, tensor) of a plan, in the order in which they are read best.

    One layer is in memory at a time. Names are layer names as the checkpoint spells them, plus the
    suffixes of the method that the layer runs in. Layers that only a draft model runs are left out.

    Args:
        wanted: which of its layers to read.
        compose: makes the tensors of a layer; `compose_layer` if None.
    Raises (while iterating):
        CheckpointError: a file cannot be read or changed meanwhile, or a weight is NaN or infinite.
    """

    def __init__(
        self,
        plan: Plan,
        wanted: Callable[[PlannedLayer], bool] = lambda _: True,
        how: Reading = AS_USUAL,
        compose: Compose | None = None,
    ) -> None:
        self.plan = plan.check()
        self._how = how
        self._compose = compose or compose_layer
        self.layers = tuple(
            in_reading_order(x for x in plan.layers if x.kind != "draft" and wanted(x))
        )

    def __iter__(self) -> Weights:
        with self.plan.preset.concealing(), Reader(self._how) as reader:
            for layer in self.layers:
                outputs = self._compose(layer, self.plan.target, reader)
                for suffix in list(outputs):
                    # handed over: what is placed is gone before the next is made
                    yield layer.tensor_name(suffix), outputs.pop(suffix)
            for source in self.plan.sources.values():
                source.check_unchanged()

    def __len__(self) -> int:
        return sum(len(layer.outputs) for layer in self.layers)


def in_file_order(layers: Iterable[PlannedLayer]) -> list[PlannedLayer]:
    """Order layers as they lie in the files, one file after another."""

    def place(layer: PlannedLayer) -> tuple[str, int]:
        places = ((str(tensor.path), tensor.start) for tensor in layer.inputs.values())
        return min(places, default=("", 0))  # of what is made of no tensor

    return sorted(layers, key=place)


def in_reading_order(layers: Iterable[PlannedLayer]) -> list[PlannedLayer]:
    """Order layers so that each file is read forward, after the largest layers of any file.

    While these are placed, their bytes are in memory twice, which at the end would be on top of the
    whole model.
    """

    def size(layer: PlannedLayer) -> int:
        return max(_LARGE_BYTES, sum(tensor.num_bytes for tensor in layer.inputs.values()))

    return sorted(in_file_order(layers), key=size, reverse=True)


def compose_layer(
    layer: PlannedLayer, target: Target, reader: Reader, quantize: Quantize | None = None
) -> Tensors:
    """Read one layer and make of it what the plan says.

    Args:
        quantize: makes a method's tensors of a weight [N, K]; `round_to_nearest` if None.
    Returns:
        parameter suffix -> tensor, with the dtypes and shapes of `layer.outputs`.
    Raises:
        CheckpointError: a weight is NaN or infinite, or does not fit the model's dtype.
    """
    with plain_defaults():
        stored = {suffix: reader.read_finite(tensor) for suffix, tensor in layer.inputs.items()}
        ratio = rescaling(layer.rescale, target, reader) if layer.rescale else None
        outputs = compute(layer, stored, target, quantize or round_to_nearest, ratio)
    return {
        suffix: fit(outputs[suffix], spec, f"{layer.name}.{suffix}")
        for suffix, spec in layer.outputs.items()
    }


def compose_floats(layer: PlannedLayer, target: Target, reader: Reader) -> Tensors:
    """Read one layer as it is before it is rounded, whatever the plan makes of it.

    Returns:
        parameter suffix -> tensor; "weight" [N, K] is float32 where it was quantized or rescaled.
    Raises:
        CheckpointError: as `compose_layer`, or the layer's format is only served.
    """
    with plain_defaults():
        stored = {suffix: reader.read_finite(tensor) for suffix, tensor in layer.inputs.items()}
        if layer.stored is not None and not layer.stored.is_plain:
            made, codes = _dequantize(layer, stored), layer.stored.suffixes - {"weight"}
            stored = {s: t for s, t in made.items() if s not in codes}
        if layer.rescale is not None:
            ratio = rescaling(layer.rescale, target, reader)
            stored["weight"] = stored["weight"].float() * ratio
    return stored


def compose_served(layer: PlannedLayer, target: Target, reader: Reader) -> Tensors:
    """Compose a layer and give the floats that its served tensors stand for.

    Returns:
        parameter suffix -> tensor; "weight" is float32 [N, K] where it is quantized.
    Raises:
        CheckpointError: as `compose_layer`, or the layer's format is only served.
    """
    return served_floats(layer, compose_layer(layer, target, reader))


def served_floats(layer: PlannedLayer, outputs: Tensors) -> Tensors:
    """The floats that a layer's served tensors stand for; see `compose_served`."""
    if layer.scheme is None or layer.is_unquantized:
        return outputs
    lazy, arguments = METHODS[layer.method].codec, layer.scheme.arguments
    own: Collection[str] = METHODS[layer.method].stored(arguments, 128, 128, "BF16")
    if not lazy:
        assert layer.stored is not None
        lazy, arguments, own = layer.stored.codec, layer.stored.how, layer.stored.suffixes
    if not lazy:
        return outputs
    with plain_defaults(), _naming(layer.name):
        weight = load_codec(lazy).read(outputs, arguments).dequantize()
    return {s: t for s, t in outputs.items() if s not in own} | {"weight": weight}


def compute(
    layer: PlannedLayer,
    stored: Tensors,
    target: Target,
    quantize: Quantize,
    ratio: torch.Tensor | None,
) -> Tensors:
    """Make of stored tensors what the plan says, but for casts.

    Args:
        stored: parameter suffix -> tensor, of the whole layer or of a part of its weight.
        ratio: what the columns are multiplied by, float32 [K].
    """
    if layer.action == "calibrate":
        return quantize(layer, torch.empty(0), target)
    is_composed = layer.stored is not None and layer.stored.is_composed
    if layer.action in ("dequantize", "requantize") or is_composed:
        stored = _dequantize(layer, stored)
    if ratio is not None:
        stored = {**stored, "weight": stored["weight"].float() * ratio}
    if layer.action in ("quantize", "requantize"):
        made = quantize(layer, stored["weight"], target)
        # last: both formats may have tensors of one name
        return {s: t for s, t in stored.items() if s != "weight"} | made
    if layer.action == "dequantize":
        return stored
    if layer.action == "repack":
        return _repack(layer, stored, target)
    return take_as_stored(layer, stored, target)


@contextlib.contextmanager
def plain_defaults() -> Iterator[None]:
    """Torch's own defaults: SGLang loads under the model's dtype, which would round constants."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


def round_to_nearest(layer: PlannedLayer, weight: torch.Tensor, target: Target) -> Tensors:
    """Quantize a weight [N, K] as its scheme says, each weight to the nearest code.

    Raises:
        CheckpointError: it is computed from text, not from a weight.
    """
    if layer.action == "calibrate":
        remedy = "run mixedprec convert, and take the folder that it writes"
        problem = Problem(layer.name, "is computed from text", remedy, "not-calibrated")
        raise CheckpointError(problem)
    assert layer.scheme is not None
    codec = load_codec(METHODS[layer.scheme.method].codec)
    with _naming(f"{layer.name}.weight"):
        return codec.quantize(weight, layer.scheme.arguments, TORCH_DTYPES[target.dtype])


def rescaling(rescale: Rescale, target: Target, reader: Reader) -> torch.Tensor:
    """What the columns of a weight [N, K] are multiplied by, float32 [K].

    It is (own[k] + offset) / (served[k] + offset). The served norm counts as it is served, rounded
    to the model's dtype, so that W (own * x) is W' (served * x) but for one rounding of W' to
    float32.
    """
    own = reader.read(rescale.own).double() + rescale.offset
    served = reader.read(rescale.served).to(TORCH_DTYPES[target.dtype]).double() + rescale.offset
    # zero in both, as the plan made sure: such a feature is never seen
    return torch.where(served == 0, 1.0, own / torch.where(served == 0, 1.0, served)).float()


def _dequantize(layer: PlannedLayer, stored: Tensors) -> Tensors:
    assert layer.stored is not None
    with _naming(layer.name):
        weight = layer.stored.dequantize(stored)
        bias = {"bias": layer.stored.own_bias(stored)} if "bias" in stored else {}
    if not _is_finite(weight):
        what = f"its {layer.stored.description} weights dequantize to NaN or infinite values"
        remedy = "the checkpoint is damaged; download it again"
        raise CheckpointError(Problem(layer.name, what, remedy, "finite"))
    # last: the codes of some formats are named "weight", too
    return {**stored, **bias, "weight": weight}


def _repack(layer: PlannedLayer, stored: Tensors, target: Target) -> Tensors:
    """Store the same numbers as another format does; codes, zeros and scales are only moved."""
    scheme = layer.scheme
    assert scheme is not None
    assert layer.stored is not None
    codec, dtype = load_codec(METHODS[scheme.method].codec), TORCH_DTYPES[target.dtype]
    rest = {suffix: t for suffix, t in stored.items() if suffix not in layer.stored.suffixes}
    try:
        with _naming(layer.name):
            numbers = load_codec(layer.stored.codec).read(stored, layer.stored.how)
            made = codec.write(numbers, scheme.arguments, dtype)
    except NotTheSameNumbersError as error:
        bf16 = f"{to_dequantize(target.dtype)} to dequantize it"
        remedy = error.remedy or f"match it with {bf16}"
        if error.can_round and not scheme.requantize:
            remedy = f"write requantize: true to quantize it again, or {bf16}"
        what = (
            f"is stored as {layer.stored.description} and was to be repacked as {scheme.method}, "
            f"but {error}"
        )
        raise CheckpointError(Problem(layer.name, what, remedy, "repack")) from error
    for suffix, tensor in made.items():
        # codes of 8 bits are as they were read; a scale that divides may be zero
        if tensor.is_floating_point() and tensor.itemsize > 1 and not _is_finite(tensor):
            what = f"its {layer.stored.description} scales make a {suffix} that is infinite"
            remedy = "the checkpoint is damaged; take the layer from another source"
            raise CheckpointError(Problem(layer.name, what, remedy, "finite"))
    return made | rest


def _is_finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def take_as_stored(layer: PlannedLayer, stored: Tensors, target: Target) -> Tensors:
    """Add what the method needs and the tensors imply; refuse what its kernels would not read."""
    if layer.scheme is None or layer.stored is None or not layer.stored.codec:
        return stored
    take = getattr(load_codec(layer.stored.codec), "take_stored", None)
    if take is None:
        return stored
    arguments = {"desc_act": False, **layer.stored.arguments, **layer.stored.how}
    try:
        # under `auto`, SGLang's class says what it takes of a layer that no method serves
        taken: Tensors = take(stored, arguments, checks=bool(layer.stored.method))
    except NotTheSameNumbersError as error:
        remedy = f"write {to_dequantize(target.dtype)} to dequantize it"
        raise CheckpointError(Problem(layer.name, str(error), remedy, "stored-values")) from error
    return taken


@contextlib.contextmanager
def _naming(where: str) -> Iterator[None]:
    """Put the layer's name before what is wrong with a tensor."""
    try:
        yield
    except ShapeError as error:
        raise ShapeError(Problem(where, str(error))) from error


def fit(tensor: torch.Tensor, spec: TensorSpec, name: str) -> torch.Tensor:
    """Cast floats to the dtype that is served, and see that the rest is right.

    Raises:
        CheckpointError: a value is over what the dtype holds.
    """
    dtype = TORCH_DTYPES[spec.dtype]
    if tensor.dtype != dtype and tensor.is_floating_point():
        tensor = cast(tensor, dtype, name)
    tensor = tensor.reshape(spec.shape) if tensor.numel() == 1 else tensor
    assert tensor.dtype == dtype, (name, DTYPE_NAMES[tensor.dtype], spec)
    assert tuple(tensor.shape) == spec.shape, (name, tensor.shape, spec)
    return tensor


def cast(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """Cast floats.

    Raises:
        CheckpointError: a value is over what float16 holds.
    """
    made = tensor.to(dtype)
    if dtype == torch.float16 and not bool(torch.isfinite(made).all()):
        what = "has values over 65504, which float16 cannot hold"
        raise CheckpointError(Problem(name, what, "start with --dtype bfloat16", "finite"))
    return made
