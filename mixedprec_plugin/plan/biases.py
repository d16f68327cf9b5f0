"""Biases of layers that come from another source than the model's own.

A layer's bias comes with its weight. Where the model has none (GPTQ tools write zeros), a bias of
zeros is left out. Where the model has one and the source lacks it, zeros are taken from the model;
a bias that is not zero is not: a tool that drops it may have put it elsewhere, and rows that a tool
scaled need a scaled bias.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from mixedprec_plugin.checkpoint.headers import DTYPE_BITS, StoredTensor
from mixedprec_plugin.checkpoint.source import Source
from mixedprec_plugin.checkpoint.values import Values
from mixedprec_plugin.errors import Problem
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.methods.stored import TensorSpec
from mixedprec_plugin.plan.folding import fold_names
from mixedprec_plugin.plan.model import PlannedLayer

_BIAS = "bias"


def settle_biases(
    layers: Iterable[PlannedLayer], model: Source, target: Target, values: Values
) -> tuple[list[PlannedLayer], list[Problem]]:
    """Make every linear layer have a bias just where the model's own has one.

    Args:
        layers: as the rules have them.
        model: the checkpoint of --model-path.
        target: whose dtype a bias is served in.
        values: reads biases.
    Returns:
        the layers, and an error for each kind of bias that fits nowhere.
    Raises:
        CheckpointError: a bias cannot be read.
    """
    settled = []
    found: dict[tuple[str, str], list[str]] = {}
    for layer in layers:
        own = model.layers[layer.name].get(_BIAS)
        theirs = layer.inputs.get(_BIAS)
        if layer.stored is None or layer.source == model.name or (own is None) == (theirs is None):
            settled.append(layer)
        elif theirs is not None and not values.of(theirs).any():
            settled.append(_without(layer, theirs))
        elif own is not None and not values.of(own).any():
            settled.append(_with(layer, own, target))
        else:
            settled.append(layer)
            has, lacks = (layer.source, "model") if own is None else ("model", layer.source)
            what = f"has a bias in {has!r} that is not zero, and none in {lacks!r}"
            found.setdefault((what, "take it from another source"), []).append(layer.name)
    problems = [
        Problem(", ".join(fold_names(names)), what, remedy, "bias")
        for (what, remedy), names in found.items()
    ]
    return settled, problems


def _without(layer: PlannedLayer, bias: StoredTensor) -> PlannedLayer:
    num_bytes = bias.num_bytes // (DTYPE_BITS[bias.dtype] // 8) * _served_bytes(layer.outputs)
    return dataclasses.replace(
        layer,
        inputs={suffix: tensor for suffix, tensor in layer.inputs.items() if suffix != _BIAS},
        outputs={suffix: spec for suffix, spec in layer.outputs.items() if suffix != _BIAS},
        bytes_before=layer.bytes_before - bias.num_bytes,
        bytes_after=layer.bytes_after - num_bytes,
        note="without its zero bias",
    )


def _served_bytes(outputs: Mapping[str, TensorSpec]) -> int:
    return DTYPE_BITS[outputs[_BIAS].dtype] // 8


def _with(layer: PlannedLayer, bias: StoredTensor, target: Target) -> PlannedLayer:
    num_bytes = bias.num_bytes * 8 // DTYPE_BITS[bias.dtype] * (DTYPE_BITS[target.dtype] // 8)
    return dataclasses.replace(
        layer,
        inputs={**layer.inputs, _BIAS: bias},
        outputs={**layer.outputs, _BIAS: TensorSpec(target.dtype, bias.shape)},
        bytes_before=layer.bytes_before + bias.num_bytes,
        bytes_after=layer.bytes_after + num_bytes,
        note="with the model's zero bias",
    )
