"""What the package knows of a quantization method."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

Arguments = Mapping[str, Any]
LayerKind = Literal["linear", "expert", "lm_head"]


def _no_reason(_arguments: Arguments) -> str:
    return ""


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """The dtype and shape of one stored tensor.

    Attributes:
        dtype: safetensors dtype name (`BF16`, `F16`, `F32`, `F8_E4M3`, `I8`, `I32`). Where this
            says one of `BF16`, `F16`, `F32`, a checkpoint may hold another of the three: the
            weight loaders cast.
        shape: the stored shape; `()` and `(1,)` are interchangeable in a checkpoint.
    """

    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """The shape of one linear layer as the plan's shape rules see it.

    Attributes:
        N: output features of the unfused layer.
        K: input features.
        shard_sizes: output features of every shard of the fused module that the layer is part of,
            in order; `(N,)` for a layer of its own.
        parallel: how the layer is split over tensor-parallel ranks.
        tp_size: number of tensor-parallel ranks.
        dtype: dtype that the model runs in, as a safetensors name (`BF16` or `F16`).
        shard_ranks: over how many ranks each shard is split under column parallelism, in the order
            of `shard_sizes`; empty stands for `tp_size` each. Less for the key and value shards of
            a model with fewer key-value heads than ranks: SGLang repeats those.
        is_expert: whether the layer is a projection of one expert; gate and up are shards of `w13`.
    """

    N: int
    K: int
    shard_sizes: tuple[int, ...]
    parallel: Literal["column", "row", "replicated"]
    tp_size: int = 1
    dtype: str = "BF16"
    shard_ranks: tuple[int, ...] = ()
    is_expert: bool = False


@dataclasses.dataclass(frozen=True)
class MethodSpec:
    """A quantization method: its arguments, its stored form and the SGLang class that runs it.

    Attributes:
        name: the registry key.
        title: what it is, in one line, for people.
        aliases: other names that people type -> the arguments that the name implies.
        defaults: every argument of the method -> its default.
        argument_schema: file name below schemas/methods/.
        config_classes: platform -> lazy `package.module:Class` of the config. Platforms are `cuda`,
            `cpu` and, for GPUs below `fallback_below`, `cuda_fallback`; empty if SGLang's
            unquantized methods serve it.
        build: (arguments, key of config_classes) -> keyword arguments of that class's constructor;
            pure.
        stored: (arguments, N, K, dtype) -> tensor suffix -> its dtype and shape, exactly what the
            quantizer makes and what a checkpoint must hold; dtype is that of the running model.
        quantizer: lazy `package.module:function` (weight [N, K], arguments, dtype) -> tensors by
            suffix; empty if the method cannot quantize.
        dequantizer: lazy `package.module:function` (tensors by suffix, arguments) -> [N, K]
            float32.
        precision: rank for `on_fused_conflict: highest`; bits a weight, then quality.
        layer_kinds: what the method serves.
        min_capability: least CUDA compute capability, as major * 10 + minor.
        check_shape: (arguments, layer shape, device) -> problems as (text, remedy) pairs; device is
            `cuda` or `cpu`.
        fallback_below: CUDA compute capability below which `cuda_fallback` is the class; 0 if there
            is no such class.
        argument_conflict: arguments -> why they contradict each other; empty if they do not.
        sglang: lazy `package.module` of what SGLang needs of the method, empty if nothing; imported
            where a model is built. Each of these names may be in it:
            `UNSUMMED_EXPERTS: tuple[type, ...]`: SGLang's methods for its experts that can return
            every choice's output; on CUDA where they run in Triton's or Marlin's kernels.
            `repaired(config) -> config`: a config of SGLang's for it -> the one whose experts
            compute rightly; all others are returned as they are.
            `CPU_EXPERTS: type`: its method for groups of experts on the CPU platform, where it has
            no config class.
            `asked_of_model(config) -> Mapping[str, Any]`: attributes that its kernels ask the
            config of the whole model for.
        moe_kernels: SGLang's kernels that its experts run in where no backend is asked for; empty
            if SGLang chooses by what is stored.
        moe_backends: explicit values of --moe-runner-backend that its experts really run in;
            SGLang's classes pass others over without a word (`create_moe_runner` in
            quantization/{unquant,fp8,blockwise_int8}.py). Marlin's run where none is asked for
            alone (gptq_kernels.py, awq_moe.py: `assert get_moe_runner_backend().is_auto()`).
        why_not_quantize: arguments -> why a layer cannot be quantized with them and must be stored
            so; empty if it can.
    """

    name: str
    title: str
    aliases: Mapping[str, Arguments]
    defaults: Arguments
    argument_schema: str
    config_classes: Mapping[str, str]
    build: Callable[[Arguments, str], dict[str, Any]]
    stored: Callable[[Arguments, int, int, str], dict[str, TensorSpec]]
    quantizer: str
    dequantizer: str
    precision: Callable[[Arguments], float]
    layer_kinds: frozenset[LayerKind]
    min_capability: int
    check_shape: Callable[[Arguments, LayerShape, str], list[tuple[str, str]]]
    fallback_below: int = 0
    argument_conflict: Callable[[Arguments], str] = _no_reason
    why_not_quantize: Callable[[Arguments], str] = _no_reason
    sglang: str = ""
    moe_kernels: Literal["triton", "marlin", ""] = ""
    moe_backends: frozenset[str] = frozenset()
