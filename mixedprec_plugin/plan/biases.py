"""Biases of layers that come from another source than the model's own.

A layer's bias comes with its weight. Where the model has none (GPTQ tools write zeros), a bias of
zeros is left out. Where the model has one and the source lacks it, zeros are taken from the model;
a bias that is not zero is not: a tool that drops it may have put it elsewhere, and rows that a tool
scaled need a scaled bias.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from mixedprec_plugin.checkpoint.source import Source
from mixedprec_plugin.checkpoint.values import Values
from mixedprec_plugin.errors import Problem
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.methods.stored import Tensors, TensorSpec
from mixedprec_plugin.plan.folding import fold_problems
from mixedprec_plugin.plan.model import PlannedLayer

_BIAS = "bias"


def settle_biases(
    layers: Iterable[PlannedLayer], model: Source, target: Target, values: Values
) -> tuple[list[PlannedLayer], list[Problem]]:
    """Make every linear layer have a bias just where the model's own has one.

    Args:
        layers: as the rules have them.
        target: whose dtype a bias is served in.
    Returns:
        the layers, and an error for each kind of bias that fits nowhere.
    Raises:
        CheckpointError: a bias cannot be read.
    """
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
            outputs = {**layer.outputs, _BIAS: TensorSpec(target.dtype, own.shape)}
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
    stored = sum(x.num_bytes for x in inputs.values()) - sum(
        x.num_bytes for x in layer.inputs.values()
    )
    served = sum(spec.num_bytes for spec in outputs.values()) - sum(
        spec.num_bytes for spec in layer.outputs.values()
    )
    return dataclasses.replace(
        layer,
        inputs=inputs,
        outputs=outputs,
        bytes_before=layer.bytes_before + stored,
        bytes_after=layer.bytes_after + served,
        note=note,
    )
