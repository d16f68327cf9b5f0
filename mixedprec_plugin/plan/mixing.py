"""What layers of several sources need to be one model.

A layer's bias comes with its weight. Where the model has none (GPTQ tools write zeros), a bias of
zeros is left out. Where the model has one and the source lacks it, zeros are taken from the model;
a bias that is not zero is not: a tool that drops it may have put it elsewhere, and rows that a tool
scaled need a scaled bias.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from mixedprec_plugin.checkpoint.source import Source
from mixedprec_plugin.checkpoint.values import Values
from mixedprec_plugin.errors import Problem
from mixedprec_plugin.families.table import family_of
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.methods.recognition import FormatCache
from mixedprec_plugin.methods.stored import Tensors, TensorSpec
from mixedprec_plugin.plan.compatibility import check_sources
from mixedprec_plugin.plan.coupling import Coupling
from mixedprec_plugin.plan.folding import fold_problems
from mixedprec_plugin.plan.matching import Matches
from mixedprec_plugin.plan.model import PlannedLayer
from mixedprec_plugin.plan.pairs import Pairs
from mixedprec_plugin.preset.model import Preset

_BIAS = "bias"


def settle_sources(
    preset: Preset,
    layers: Sequence[PlannedLayer],
    sources: Mapping[str, Source],
    target: Target,
    matches: Matches,
    tied: Mapping[str, str],
    formats: FormatCache,
) -> tuple[list[PlannedLayer], list[Problem]]:
    """Make layers of several sources fit each other; layers of one source are left as they are.

    Args:
        layers: as the rules have them.
        tied: tied layer name -> the layer whose weight it shares.
    Returns:
        the layers, with norms and biases where they belong and consumers rescaled, and what is
        wrong. Sources of different models are only told to be so: nothing else can be said of them.
    Raises:
        CheckpointError: a small tensor, or a layer of a pair, cannot be read.
    """
    if len({sources[layer.source].path for layer in layers}) < 2:
        return list(layers), []
    values = Values()
    problems = check_sources(preset, layers, sources, values, formats)
    if any(problem.severity == "error" for problem in problems):
        return list(layers), problems
    settled, wrong = _settle_biases(layers, sources["model"], target.dtype, values)
    problems += wrong
    trusted = preset.trust_sources
    coupling = Coupling(settled, sources, matches, tied, values, target.dtype, trusted)
    problems += coupling.settle()
    norms = {name: unit.norm for unit in coupling.units for name in unit.consumers}
    offset = family_of(sources["model"].config).norm_offset or 0.0
    pairs = Pairs(coupling.layers, sources, norms, offset, values, formats, trusted)
    problems += pairs.check()
    return list(coupling.layers.values()), problems


def _settle_biases(
    layers: Iterable[PlannedLayer], model: Source, dtype: str, values: Values
) -> tuple[list[PlannedLayer], list[Problem]]:
    """Make every linear layer have a bias just where the model has one, or say why not."""
    settled, problems = [], []
    for layer in layers:
        own = model.layers.get(layer.name, {}).get(_BIAS)
        theirs = layer.inputs.get(_BIAS)
        if layer.stored is None or layer.source == model.name or (own is None) == (theirs is None):
            pass
        elif theirs is not None and not values.of(theirs).any():
            inputs = {suffix: x for suffix, x in layer.inputs.items() if suffix != _BIAS}
            outputs = {suffix: x for suffix, x in layer.outputs.items() if suffix != _BIAS}
            layer = _changed(layer, inputs, outputs, "without its zero bias")
        elif own is not None and not values.of(own).any():
            inputs = {**layer.inputs, _BIAS: own}
            outputs = {**layer.outputs, _BIAS: TensorSpec(dtype, own.shape)}
            layer = _changed(layer, inputs, outputs, "with the model's zero bias")
        else:
            has, lacks = (layer.source, "model") if own is None else ("model", layer.source)
            what = f"has a bias in {has!r} that is not zero, and none in {lacks!r}"
            problems.append(Problem(layer.name, what, "take it from another source", "bias"))
        settled.append(layer)
    return settled, fold_problems(problems)


def _changed(
    layer: PlannedLayer, inputs: Tensors, outputs: Mapping[str, TensorSpec], note: str
) -> PlannedLayer:
    return dataclasses.replace(
        layer,
        inputs=inputs,
        outputs=outputs,
        bytes_before=layer.bytes_before + _size(inputs) - _size(layer.inputs),
        bytes_after=layer.bytes_after + _size(outputs) - _size(layer.outputs),
        note=note,
    )


def _size(tensors: Tensors | Mapping[str, TensorSpec]) -> int:
    return sum(tensor.num_bytes for tensor in tensors.values())
