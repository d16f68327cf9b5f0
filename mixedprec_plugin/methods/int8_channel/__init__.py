"""Method `int8_channel`: 8-bit integer weights with a scale an output channel, INT8 activations."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

from mixedprec_plugin.methods import scaled, shapes
from mixedprec_plugin.methods.cards import version
from mixedprec_plugin.methods.integers import GROUP_SIZES, largest
from mixedprec_plugin.methods.interface import (
    Alternative,
    Arguments,
    Fault,
    LayerShape,
    Method,
    Rounding,
    Target,
)
from mixedprec_plugin.methods.stored import Said, StoredFormat, Tensors, TensorSpec

NAME = "int8_channel"
CODES, ENCODING = "I8", "int8"

# a step is 2 * top / 255, and top / RMS is 4 to 12 for a row of a real layer
_LIMIT = 0.03
_LAST_CAPABILITY = 90


def recognize(tensors: Tensors, said: Said) -> StoredFormat | None:
    """Take int8 codes beside a scale a row, where activations may have a scale a token."""
    found = scaled.recognize_channels(tensors, said, CODES)
    return found and dataclasses.replace(found, method=NAME, like=NAME)


def faults(_arguments: Arguments, shape: LayerShape, target: Target) -> list[Fault]:
    """Return what CUTLASS's `int8_scaled_mm` refuses; experts run in a Triton kernel.

    Source: sgl-kernel/csrc/gemm/int8_gemm_kernel.cu, which asks for K in multiples of 16 and N in
    multiples of 8, and has no code for compute capability 10.0 and up. For 7.5 the class says that
    it runs (w8a8_int8.py:88), and sglang-kernel 0.4.10 is compiled for 8.0 and up.
    """
    if target.device != "cuda" or shape.is_expert:
        return []
    why = "which INT8 matmuls need"
    texts = shapes.input_faults(shape, 16, why) + shapes.output_faults(shape, 8, why)
    found = shapes.shape_faults(texts)
    if target.gpu is not None and (text := too_new(target.gpu.capability)):
        found.append(Fault("gpu", text))
    return found


def too_new(capability: int) -> str:
    """Say why linear layers do not run on a GPU of a compute capability; empty if they may."""
    if capability <= _LAST_CAPABILITY:
        return ""
    return (
        f"SGLang's {NAME} has no kernel for this GPU, whose compute capability is "
        f"{version(capability)} (expected 8.0 to {version(_LAST_CAPABILITY)})"
    )


METHOD = Method(
    name=NAME,
    title="8-bit integers, one scale an output channel",
    description="8-bit integer weights with one scale for each output channel, and activations "
    "quantized to INT8 at run time with a scale for each token. There is nothing to choose, so "
    "there are no arguments.",
    aliases={"w8a8_int8": {}, "int8_per_channel": {}, "int8_channelwise": {}, "int8_dynamic": {}},
    schema={},
    # `W8A8Int8LinearMethod.create_weights` (layers/quantization/w8a8_int8.py:172); W = q * scale
    stored=lambda _arguments, N, K, _dtype: {
        "weight": TensorSpec(CODES, (N, K)),
        "weight_scale": TensorSpec("F32", (N, 1)),
    },
    recognize=recognize,
    read_config=dict.fromkeys((NAME, "w8a8_int8"), scaled.says_channels(ENCODING)),
    declare=lambda _arguments: {"quant_method": NAME},
    faults=faults,
    # above INT8 in blocks: no shard of a fused module shares a scale with another, and activations
    # are rounded where there they are truncated
    rounding=lambda _arguments: Rounding(
        rank=8.3, limit=_LIMIT, error=lambda _N, K: largest(K) / 127 / math.sqrt(12)
    ),
    alternatives=(
        Alternative("fp8_channel"),
        Alternative("blockwise_int8"),
        Alternative("fp8"),
        Alternative("gptq", tuple({"bits": 8, **size} for size in GROUP_SIZES)),
        Alternative("awq"),
    ),
    config_classes={
        "cuda": "mixedprec_plugin.methods.int8_channel.sglang:ChannelInt8Config",
        "cpu": "mixedprec_plugin.methods.int8_channel.sglang:CpuChannelInt8Config",
    },
    config_arguments=lambda _arguments, _platform: {"quant_config": {}},
    codec="mixedprec_plugin.methods.int8_channel.codec",
    min_capability=80,
    why_not_repack=partial(scaled.why_not_channels, CODES),
    quantizes_parts=True,
    sglang="mixedprec_plugin.methods.int8_channel.sglang",
    # layers/quantization/w8a8_int8.py, `W8A8Int8LinearMethod.apply`
    kernel=lambda _arguments, _shape, _capability: "int8_scaled_mm",
    moe_kernels="triton",
    moe_backends=frozenset({"triton"}),
)
