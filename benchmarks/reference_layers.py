"""Layers of a transformers model, made of what a virtual checkpoint holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any

import numpy as np
import torch

from benchmarks.activations import (
    QuantizedInputLinear,
    WeightOnlyLinear,
    input_quantizer,
    scales_by_row,
)
from mixedprec_plugin.methods.registry import METHODS
from mixedprec_plugin.plan.model import PlannedLayer
from tests.reference.dequantize import dequantize_method

QUANTIZED = frozenset(name for name, method in METHODS.items() if method.codec)
Tensors = Mapping[str, torch.Tensor]
Linear = QuantizedInputLinear | WeightOnlyLinear


class ReferenceError(Exception):
    """The virtual checkpoint and the transformers model do not fit each other."""


def by_layer(stream: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, Tensors]]:
    """Group a stream by layer; it yields a layer's tensors one after the other."""
    for layer, items in groupby(stream, key=lambda item: item[0].rpartition(".")[0]):
        yield layer, {name.rpartition(".")[2]: tensor for name, tensor in items}


def reference_linear(layer: PlannedLayer, tensors: Tensors) -> Linear:
    """Make a layer that computes what SGLang's kernels do.

    Args:
        tensors: as the layer is served.
    Returns:
        a layer with the dequantized weight or, where the method quantizes activations, one that
        does so too.
    """
    bias = tensors["bias"].float() if "bias" in tensors else None
    if layer.method not in QUANTIZED:
        return WeightOnlyLinear(tensors["weight"].float(), bias)
    assert layer.scheme is not None
    arguments = layer.scheme.arguments
    quantizer = input_quantizer(layer.method, arguments)
    if quantizer is None:
        return WeightOnlyLinear(_dequantize(layer.method, tensors, arguments), bias)
    codes, block = tensors["weight"].float(), arguments.get("weight_block_size")
    scales = tensors["weight_scale" if block is None else "weight_scale_inv"]
    by_row = scales_by_row(scales, len(codes), block)
    # as CUTLASS's int8_scaled_mm and Triton's fused_moe_kernel do
    joins = layer.method == "int8_channel"
    return QuantizedInputLinear(codes, by_row, bias, quantizer, joins_scales=joins)


def replace_layer(model: Any, name: str, module: Linear) -> None:
    """Put a layer in the place of transformers' own.

    Raises:
        ReferenceError: the one there has another shape.
    """
    parent, _, attribute = name.rpartition(".")
    old = model.get_submodule(name)
    is_codes = isinstance(module, QuantizedInputLinear)
    shape = tuple(module.get_buffer("codes" if is_codes else "weight").shape)
    if shape != tuple(old.weight.shape):
        raise ReferenceError(f"{name}: dequantized to {shape} (expected {tuple(old.weight.shape)})")
    setattr(model.get_submodule(parent), attribute, module)


def _dequantize(method: str, tensors: Tensors, arguments: Mapping[str, Any]) -> torch.Tensor:
    arrays = {
        suffix: (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        for suffix, tensor in tensors.items()
        if suffix != "bias"
    }
    weight = np.ascontiguousarray(dequantize_method(method, arrays, arguments), dtype=np.float32)
    return torch.from_numpy(weight)
