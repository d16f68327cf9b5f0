"""transformers on dequantized weights: what an engine's logits are held against."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.activations import (
    QuantizedInputLinear,
    WeightOnlyLinear,
    input_quantizer,
    scales_by_row,
)
from benchmarks.families.architectures import Architecture
from benchmarks.families.experts import Projection, ReferenceExperts
from mixedprec_plugin.compose.stream import VirtualCheckpoint
from mixedprec_plugin.plan.architecture import ExpertShard
from mixedprec_plugin.plan.model import PlannedLayer
from tests.reference.dequantize import dequantize_method

_QUANTIZED = frozenset({"fp8", "blockwise_int8", "awq", "gptq"})
Tensors = Mapping[str, torch.Tensor]


class ReferenceError(Exception):
    """The virtual checkpoint and the transformers model do not fit each other."""


def run_reference(
    architecture: Architecture,
    model_path: Path,
    stream: VirtualCheckpoint,
    prompt: list[int],
    forced: list[int],
) -> torch.Tensor:
    """Run a prompt at once and then token after token, with the weights of a virtual checkpoint.

    Args:
        forced: the tokens to go on with.
    Returns:
        logits, float32 [T + len(forced), V].
    Raises:
        ReferenceError: a layer that transformers does not have, or one of another shape.
    """
    model = _load(architecture, model_path)
    _put_weights(model, stream)
    logits, cache = [], None
    with torch.inference_mode():
        for tokens in (prompt, *([token] for token in forced)):
            out = model(torch.tensor([tokens]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits[0].float())
    return torch.cat(logits)


def _load(architecture: Architecture, path: Path) -> Any:
    model_class: Any = getattr(transformers, architecture.model_class)
    model = model_class.from_pretrained(path, dtype=torch.bfloat16, attn_implementation="eager")
    return model.eval()


def _put_weights(model: Any, stream: VirtualCheckpoint) -> None:
    """Put every quantized layer in its place; the rest is there as it is stored."""
    experts: dict[str, ReferenceExperts] = {}
    mixtures = {
        module
        for module, layers in stream.plan.modules.items()
        if any(isinstance(x.shard, ExpertShard) and x.method in _QUANTIZED for x in layers)
    }
    by_layer = groupby(stream, key=lambda item: item[0].rpartition(".")[0])
    for name, items in by_layer:
        layer = stream.plan.by_name[name]
        tensors = {name.rpartition(".")[2]: tensor for name, tensor in items}
        if layer.module in mixtures:
            if layer.module not in experts:
                experts[layer.module] = _split(model, layer.module)
            assert isinstance(layer.shard, ExpertShard)
            experts[layer.module].put(*layer.shard, _projection(layer, tensors))
        elif layer.method in _QUANTIZED:
            _replace(model, _spelled(model, name), _linear(layer, tensors))
        else:
            _check_same(model, _spelled(model, name), tensors)


def _spelled(model: Any, name: str) -> str:
    """The module that transformers makes of a layer of the checkpoint."""
    name = name.replace(".block_sparse_moe.", ".mlp.")
    if hasattr(model.model, "language_model"):
        name = name.replace("visual.", "model.visual.", 1) if name.startswith("visual.") else name
        name = name.replace("model.", "model.language_model.", 1) if _is_text(name) else name
    return name


def _is_text(name: str) -> bool:
    return name.startswith(("model.layers.", "model.embed_tokens", "model.norm"))


def _check_same(model: Any, name: str, tensors: Tensors) -> None:
    """What is not quantized is served as it is stored."""
    for suffix, tensor in tensors.items():
        full = f"{name}.{suffix}"
        held = {**dict(model.named_parameters()), **dict(model.named_buffers())}.get(full)
        if held is None and ".experts." in full:
            continue
        if held is None or not torch.equal(held.float(), tensor.float()):
            raise ReferenceError(f"{full}: transformers holds another tensor (expected the same)")


def _split(model: Any, module: str) -> ReferenceExperts:
    parent = model.get_submodule(_spelled(model, module).rpartition(".")[0])
    parent.experts = ReferenceExperts(parent.experts)
    made: ReferenceExperts = parent.experts
    return made


def _replace(model: Any, name: str, module: torch.nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    old = model.get_submodule(name)
    buffers = dict(module.named_buffers())
    shape = (buffers["codes"] if "codes" in buffers else buffers["weight"]).shape
    if shape != old.weight.shape:
        raise ReferenceError(f"{name}: dequantized to {shape} (expected {old.weight.shape})")
    setattr(model.get_submodule(parent), attribute, module)


def _projection(layer: PlannedLayer, tensors: Tensors) -> Projection:
    arguments = layer.scheme.arguments if layer.scheme is not None else {}
    is_fp8 = layer.method == "fp8" and arguments["weight_block_size"] is None
    if not is_fp8:
        return Projection(_linear(layer, tensors))
    return Projection(None, tensors["weight"].float(), tensors["weight_scale"].float().reshape(()))


def _linear(layer: PlannedLayer, tensors: Tensors) -> torch.nn.Module:
    bias = tensors["bias"].float() if "bias" in tensors else None
    if layer.method not in _QUANTIZED:
        return WeightOnlyLinear(tensors["weight"].float(), bias)
    assert layer.scheme is not None
    arguments = layer.scheme.arguments
    quantizer = input_quantizer(layer.method, arguments)
    if quantizer is None:
        return WeightOnlyLinear(_dequantize(layer.method, tensors, arguments), bias)
    codes, block = tensors["weight"].float(), arguments["weight_block_size"]
    scales = tensors["weight_scale" if block is None else "weight_scale_inv"]
    return QuantizedInputLinear(codes, scales_by_row(scales, len(codes), block), bias, quantizer)


def _dequantize(method: str, tensors: Tensors, arguments: Mapping[str, Any]) -> torch.Tensor:
    arrays = {
        suffix: (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        for suffix, tensor in tensors.items()
        if suffix != "bias"
    }
    weight = np.ascontiguousarray(dequantize_method(method, arrays, arguments), dtype=np.float32)
    return torch.from_numpy(weight)
