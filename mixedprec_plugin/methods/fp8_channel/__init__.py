"""Method `fp8_channel`: e4m3 weights with a scale for each output channel, FP8 activations."""

from __future__ import annotations

from typing import Any

from mixedprec_plugin.methods import fp8, remedies
from mixedprec_plugin.methods.spec import Arguments, LayerShape, MethodSpec, TensorSpec


def build(_arguments: Arguments, _platform: str) -> dict[str, Any]:
    """Return the constructor arguments of `W8A8Fp8Config` for a serialized FP8 checkpoint."""
    return {"is_checkpoint_fp8_serialized": True}


def stored(_arguments: Arguments, N: int, K: int, _dtype: str) -> dict[str, TensorSpec]:
    """Return the stored tensors: "weight" [N, K] e4m3 and "weight_scale" [N, 1]; W = q * scale.

    Shards of a fused module, and those of several sources, stand one below the other: no scale is
    shared, so none is rounded again.

    Source: `W8A8Fp8LinearMethod.create_weights` (layers/quantization/w8a8_fp8.py:147).
    """
    return {"weight": TensorSpec("F8_E4M3", (N, K)), "weight_scale": TensorSpec("F32", (N, 1))}


def faults(_arguments: Arguments, shape: LayerShape, device: str) -> list[str]:
    """Return what keeps SGLang's linear method from a layer: what keeps `fp8` without blocks.

    Source: `W8A8Fp8LinearMethod.apply` calls the same `apply_fp8_linear` (fp8_utils.py:2501).
    """
    return fp8.faults({"weight_block_size": None}, shape, device)


def check_shape(arguments: Arguments, shape: LayerShape, device: str) -> list[tuple[str, str]]:
    """Return (text, remedy) for everything that keeps the layer from being served so."""
    found = faults(arguments, shape, device)
    return remedies.pair("fp8_channel", arguments, shape, device, found)


SPEC = MethodSpec(
    name="fp8_channel",
    title="8-bit floating point (e4m3), one scale an output channel",
    aliases={
        "fp8_per_channel": {},
        "fp8_channelwise": {},
        "fp8_dynamic": {},
        "w8a8_fp8": {},
    },
    defaults={},
    argument_schema="fp8_channel.schema.json",
    config_classes={
        "cuda": "mixedprec_plugin.methods.fp8_channel.sglang:ChannelFp8Config",
        "cpu": "mixedprec_plugin.methods.fp8_channel.sglang:CpuChannelFp8Config",
    },
    build=build,
    stored=stored,
    quantizer="mixedprec_plugin.methods.fp8_channel.codec:quantize",
    dequantizer="mixedprec_plugin.methods.fp8_channel.codec:dequantize",
    # between a scale a tensor and one a 128x128 block, whose activations have more scales, too
    precision=lambda _arguments: 8.05,
    layer_kinds=frozenset({"linear", "expert"}),
    min_capability=89,
    check_shape=check_shape,
    sglang="mixedprec_plugin.methods.fp8_channel.sglang",
    moe_kernels="triton",
    moe_backends=frozenset({"triton"}),
)
