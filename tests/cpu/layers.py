"""Builds SGLang's linear layers and fills them with what the package's quantizers store."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
import torch

from mixedprec_plugin.methods.awq import codec as awq
from mixedprec_plugin.methods.blockwise_int8 import codec as blockwise_int8
from mixedprec_plugin.methods.fp8 import codec as fp8
from mixedprec_plugin.methods.fp8_channel import codec as fp8_channel
from mixedprec_plugin.methods.gptq import codec as gptq
from mixedprec_plugin.methods.humming import codec as humming
from mixedprec_plugin.methods.int8_channel import codec as int8_channel
from mixedprec_plugin.methods.mxfp4 import codec as mxfp4
from mixedprec_plugin.methods.nvfp4 import codec as nvfp4
from tests.reference.dequantize import dequantize_method

# input features, and output features of each shard of a layer kind
K = 768
SIZES = {"column": (768,), "merged": (768, 768), "qkv": (768, 256, 256), "row": (640,)}

QUANTIZERS = {
    "fp8": fp8, "fp8_channel": fp8_channel, "blockwise_int8": blockwise_int8,
    "int8_channel": int8_channel, "awq": awq, "gptq": gptq,
    "humming": humming, "nvfp4": nvfp4, "mxfp4": mxfp4,
}  # fmt: skip
SHARDS: Mapping[str, tuple[str | int | None, ...]] = {
    "column": (None,),
    "merged": (0, 1),
    "qkv": ("q", "k", "v"),
    "row": (None,),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A method with its arguments."""

    method: str
    arguments: Mapping[str, Any]

    def __str__(self) -> str:
        return "-".join([self.method, *(str(value) for value in self.arguments.values())])


def make_config(case: Case) -> Any:
    """The CPU config of a method, constructed as the installed SGLang takes it."""
    from mixedprec_plugin.methods.construct import build_config
    from mixedprec_plugin.methods.registry import bind

    return build_config(*bind(case.method, case.arguments), "cpu")


def make_layer(linear: ModuleType, kind: str, config: Any, sizes: tuple[int, ...], K: int) -> Any:
    """An SGLang linear layer of one of the four parallel kinds, in bfloat16, without bias."""
    options = {
        "bias": False, "params_dtype": torch.bfloat16, "quant_config": config, "prefix": "layer",
    }  # fmt: skip
    if kind == "column":
        return linear.ColumnParallelLinear(K, sizes[0], **options)
    if kind == "merged":
        return linear.MergedColumnParallelLinear(K, list(sizes), **options)
    if kind == "row":
        return linear.RowParallelLinear(K, sizes[0], **options)
    head_size = 64
    return linear.QKVParallelLinear(
        K, head_size, sizes[0] // head_size, sizes[1] // head_size, **options
    )


def fill(layer: Any, kind: str, stored: list[Mapping[str, torch.Tensor]]) -> None:
    """Hand every tensor to its parameter's own loader, shard by shard, then finish the layer."""
    parameters = dict(layer.named_parameters())
    for shard, tensors in zip(SHARDS[kind], stored, strict=True):
        for suffix, tensor in tensors.items():
            parameter = parameters[suffix]
            extra = () if shard is None else (shard,)
            parameter.weight_loader(parameter, tensor, *extra)
    layer.quant_method.process_weights_after_loading(layer)


def dequantize(case: Case, stored: list[Mapping[str, torch.Tensor]]) -> np.ndarray:
    """The fused weight [N, K] that the stored tensors stand for, by independent code."""
    parts = []
    for tensors in stored:
        arrays = {
            name: (t if t.dtype in (torch.int8, torch.int32) else t.float()).numpy()
            for name, t in tensors.items()
        }
        parts.append(dequantize_method(case.method, arrays, case.arguments))
    return np.concatenate(parts)
