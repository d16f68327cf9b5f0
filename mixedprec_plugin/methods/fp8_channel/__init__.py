"""Method `fp8_channel`: e4m3 weights with a scale for each output channel, FP8 activations."""

from __future__ import annotations

import dataclasses
from functools import partial

from mixedprec_plugin.methods import fp8, scaled
from mixedprec_plugin.methods.integers import GROUP_SIZES
from mixedprec_plugin.methods.interface import Alternative, Method, Rounding
from mixedprec_plugin.methods.stored import Said, StoredFormat, Tensors, TensorSpec

NAME = "fp8_channel"


def recognize(tensors: Tensors, said: Said) -> StoredFormat | None:
    """Take e4m3 codes beside a scale a row, where activations may have a scale a token."""
    found = scaled.recognize_channels(tensors, said, fp8.CODES)
    return found and dataclasses.replace(found, method=NAME, like=fp8.NAME)


METHOD = Method(
    name=NAME,
    title="8-bit floating point (e4m3), one scale an output channel",
    description="8-bit floating point (e4m3) weights with a scale for each output channel, and "
    "activations quantized to FP8 at run time with a scale for each token. There is nothing to "
    "choose, so there are no arguments.",
    aliases={"fp8_per_channel": {}, "fp8_channelwise": {}, "fp8_dynamic": {}, "w8a8_fp8": {}},
    schema={},
    # shards of a fused module, and those of several sources, stand one below the other: no scale is
    # shared, so none is rounded again; W = q * scale.
    # `W8A8Fp8LinearMethod.create_weights` (layers/quantization/w8a8_fp8.py:147)
    stored=lambda _arguments, N, K, _dtype: {
        "weight": TensorSpec(fp8.CODES, (N, K)),
        "weight_scale": TensorSpec("F32", (N, 1)),
    },
    recognize=recognize,
    read_config=dict.fromkeys((NAME, "w8a8_fp8"), scaled.says_channels(fp8.NAME)),
    declare=lambda _arguments: {"quant_method": NAME},
    # `W8A8Fp8LinearMethod.apply` calls the same `apply_fp8_linear` as `fp8` (fp8_utils.py:2501)
    faults=lambda _arguments, shape, target: fp8.whole_scale_faults(shape, target),
    # between a scale a tensor and one a 128x128 block, whose activations have more scales, too
    rounding=lambda _arguments: Rounding(8.05, fp8.LIMIT, lambda _N, _K: fp8.ERROR),
    alternatives=(
        Alternative(fp8.NAME),
        Alternative("gptq", tuple({"bits": 8, **size} for size in GROUP_SIZES)),
        Alternative("int8_channel"),
        Alternative("blockwise_int8"),
        Alternative("awq"),
    ),
    config_classes={
        "cuda": "mixedprec_plugin.methods.fp8_channel.sglang:ChannelFp8Config",
        "cpu": "mixedprec_plugin.methods.fp8_channel.sglang:CpuChannelFp8Config",
    },
    config_arguments=lambda _arguments, _platform: {"is_checkpoint_fp8_serialized": True},
    codec="mixedprec_plugin.methods.fp8_channel.codec",
    min_capability=89,
    why_not_repack=partial(scaled.why_not_channels, fp8.CODES),
    quantizes_parts=True,
    sglang="mixedprec_plugin.methods.fp8_channel.sglang",
    # fp8_utils.py:2456
    kernel=lambda _arguments, _shape, _capability: "fp8_scaled_mm",
    moe_kernels="triton",
    moe_backends=frozenset({"triton"}),
)
