"""One tensor -> its parameter's own weight loader."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead
from torch.utils._python_dispatch import _disable_current_modes

from mixedprec_plugin.errors import LoadError, Problem
from mixedprec_plugin.experts.loading import (
    check_expert_part,
    dtype_name,
    is_same_kind,
    load_expert_tensor,
)
from mixedprec_plugin.families.names import ExpertShard, scheme_unit
from mixedprec_plugin.methods.registry import AUTO
from mixedprec_plugin.plan.model import PlannedLayer
from mixedprec_plugin.serving.config import MixedPrecisionConfig
from mixedprec_plugin.serving.source_configs import refusals

# compressed-tensors' is the latter
GROUP_INDICES = ("g_idx", "weight_g_idx")
# what has one group index -> the layer whose came first, and that one
Orders = dict[tuple[str, bool], tuple[str, torch.Tensor]]


def place(
    config: MixedPrecisionConfig, layer: PlannedLayer, suffix: str, tensor: torch.Tensor
) -> None:
    """Hand a tensor of a planned layer to the parameter of the module that was built for it.

    Raises:
        LoadError: there is none that takes it.
    """
    module = config.built[layer.module]
    # our own statement of what each tensor must be is checked before; `auto` has none
    with (
        refusals(f"{layer.name}.{suffix}", type(module.quant_method).__name__)
        if layer.method == AUTO
        else contextlib.nullcontext()
    ):
        if isinstance(module, ReplicatedLinear) and layer.shard is not None:
            _lay_end_to_end(module, config.plan.modules[layer.module], layer, suffix, tensor)
        else:
            _place_tensor(module, layer, suffix, tensor)


def check_act_order(orders: Orders, layer: PlannedLayer, g_idx: torch.Tensor) -> None:
    """Hold a shard's group index against its siblings': a fused module has one for them all.

    Source: gptq/schemes/gptq_marlin.py:101 and gptq_moe.py:278 (sglang/srt/layers/quantization).
    """
    is_down = isinstance(layer.shard, ExpertShard) and layer.shard.projection == "w2"
    unit = scheme_unit(layer.module, layer.shard), is_down
    with _disable_current_modes():
        # what is made when it is read would keep all of its layer
        order = g_idx.clone().cpu()
        name, first = orders.setdefault(unit, (layer.name, order))
        is_same = torch.equal(first, order)
    if not is_same:
        what = f"has another order than {name}, and {layer.module} has one for all its shards"
        remedy = "write method: bf16 for them to be dequantized, and requantize: true beside "
        remedy += "another method"
        raise LoadError(Problem(f"{layer.name}.g_idx", what, remedy, "act-order"))


def _place_tensor(
    module: torch.nn.Module, layer: PlannedLayer, suffix: str, tensor: torch.Tensor
) -> None:
    if isinstance(layer.shard, ExpertShard):
        assert isinstance(module, FusedMoE)
        expert, projection = layer.shard
        if layer.method == AUTO:
            check_expert_part(module, layer.name, projection, suffix, tensor)
        load_expert_tensor(module, expert, projection, suffix, tensor)
        return
    parameter = _parameter(module, suffix, layer, tensor)
    if isinstance(module, ParallelLMHead):
        _fill_head(module, parameter, tensor)
        return
    loader = getattr(parameter, "weight_loader", None)
    # a scale of a fused module that is stored as one matrix is that of all shards
    is_of_all = layer.shard is None and tensor.numel() == 1 < parameter.numel()
    if loader is None or is_of_all:
        parameter.data.copy_(tensor)
    elif layer.shard is None:
        loader(parameter, tensor)
    elif _takes_shards(getattr(loader, "__func__", loader)):
        loader(parameter, tensor, layer.shard)
    else:
        what = f"{type(module).__name__} does not take shards, the plan says it is shard "
        what += f"{layer.shard!r} of {layer.module}"
        raise LoadError(Problem(f"{layer.name}.{suffix}", what, rule="fused-module"))


@functools.lru_cache(maxsize=64)
def _takes_shards(loader: Callable[..., Any]) -> bool:
    # humming wraps the loaders of the others, and has its own word for it
    return bool({"loaded_shard_id", "shard_id"} & inspect.signature(loader).parameters.keys())


def _lay_end_to_end(
    module: ReplicatedLinear,
    shards: tuple[PlannedLayer, ...],
    layer: PlannedLayer,
    suffix: str,
    tensor: torch.Tensor,
) -> None:
    """Place a shard of a layer that SGLang builds as one whole: q_a and kv_a of an MLA block."""
    parameter = _parameter(module, suffix, layer, tensor)
    dim = getattr(parameter, "output_dim", None)
    if dim is None and parameter.numel() == len(shards):  # each has a scale
        parameter.data.narrow(0, shards.index(layer), 1).copy_(tensor)
        return
    if dim is None:
        parameter.data.copy_(tensor)
        return
    before = shards[: shards.index(layer)]
    start = sum(shard.outputs[suffix].shape[dim] for shard in before)
    parameter.data.narrow(dim, start, tensor.shape[dim]).copy_(tensor)


def _fill_head(module: ParallelLMHead, parameter: Any, tensor: torch.Tensor) -> None:
    """Place this rank's part of a head's vocabulary; what pads it becomes zeros.

    SGLang's loader copies along the first dimension, which of packed codes is K
    (layers/vocab_parallel_embedding.py:468).
    """
    dim = getattr(parameter, "output_dim", None)
    if dim is None:
        parameter.data.copy_(tensor)
        return
    is_packed = getattr(parameter, "packed_dim", None) == dim
    factor = int(parameter.packed_factor) if is_packed else 1
    indices = module.shard_indices
    start, end = indices.org_vocab_start_index // factor, indices.org_vocab_end_index // factor
    size = end - start
    parameter.data.narrow(dim, 0, size).copy_(tensor.narrow(dim, start, size))
    rest = parameter.shape[dim] - size
    if rest:
        parameter.data.narrow(dim, size, rest).zero_()


def _parameter(
    module: torch.nn.Module, suffix: str, layer: PlannedLayer, tensor: torch.Tensor
) -> Any:
    """The parameter that takes a tensor.

    SGLang's loaders cast what they are given (layers/parameter.py:224): exponents in bytes would
    become scales of 120, and the largest codes of e5m2 those of e4m3.

    Raises:
        LoadError: there is none, or codes would be cast, which `auto` alone may ask for.
    """
    parameter = getattr(module, suffix, None)
    if not isinstance(parameter, torch.Tensor):
        names = ", ".join(name for name, _ in module.named_parameters())
        owner = f"{layer.module} ({type(module).__name__})"
        what = f"{owner} has no parameter {suffix!r} (expected {names})"
        remedy = "the checkpoint holds a tensor that the model does not use"
        raise LoadError(Problem(f"{layer.name}.{suffix}", what, remedy, "unknown-parameter"))
    if layer.method == AUTO and not is_same_kind(tensor, parameter):
        what = f"is stored as {dtype_name(tensor)}, which {type(module.quant_method).__name__} "
        what += f"would cast to {dtype_name(parameter)}"
        remedy = "name a method for it, or take it from another source"
        raise LoadError(Problem(f"{layer.name}.{suffix}", what, remedy, "auto-part"))
    return parameter
