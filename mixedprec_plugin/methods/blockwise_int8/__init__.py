"""Method `blockwise_int8`: 8-bit integer weights, a scale a block, and INT8 activations."""

from __future__ import annotations

from typing import Any

from mixedprec_plugin.methods import remedies
from mixedprec_plugin.methods.blocks import block_faults, grid
from mixedprec_plugin.methods.partitions import split_faults
from mixedprec_plugin.methods.spec import Arguments, LayerShape, MethodSpec, TensorSpec

_CLASS = "sglang.srt.layers.quantization.blockwise_int8:BlockInt8Config"


def build(arguments: Arguments, _platform: str) -> dict[str, Any]:
    """Return the constructor arguments of `BlockInt8Config` for a serialized INT8 checkpoint."""
    return {
        "is_checkpoint_int8_serialized": True,
        "activation_scheme": arguments["activation_scheme"],
        "ignored_layers": None,
        "weight_block_size": arguments["weight_block_size"],
    }


def stored(arguments: Arguments, N: int, K: int, _dtype: str) -> dict[str, TensorSpec]:
    """Return the stored tensors.

    "weight" [N, K] int8 and "weight_scale_inv" [ceil(N/block_n), ceil(K/block_k)];
    W = weight * scale.

    Source: `BlockInt8LinearMethod.create_weights` (layers/quantization/blockwise_int8.py:188-216).
    """
    return {
        "weight": TensorSpec("I8", (N, K)),
        "weight_scale_inv": TensorSpec("F32", grid(N, K, arguments["weight_block_size"])),
    }


def faults(arguments: Arguments, shape: LayerShape, _device: str) -> list[str]:
    """Return what SGLang's block INT8 linear method refuses of a layer."""
    return split_faults(shape) or block_faults(arguments["weight_block_size"], shape)


def check_shape(arguments: Arguments, shape: LayerShape, device: str) -> list[tuple[str, str]]:
    """Return (text, remedy) for everything that keeps the layer from being served in INT8."""
    found = faults(arguments, shape, device)
    return remedies.pair("blockwise_int8", arguments, shape, device, found)


SPEC = MethodSpec(
    name="blockwise_int8",
    title="8-bit integers, one scale a block",
    aliases={"int8": {}, "int8_block": {}, "int8_blockwise": {}, "block_int8": {}},
    defaults={"weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    argument_schema="blockwise_int8.schema.json",
    config_classes={
        "cuda": _CLASS,
        "cpu": "mixedprec_plugin.methods.blockwise_int8.sglang:CpuBlockInt8Config",
    },
    build=build,
    stored=stored,
    quantizer="mixedprec_plugin.methods.blockwise_int8.codec:quantize",
    dequantizer="mixedprec_plugin.methods.blockwise_int8.codec:dequantize",
    precision=lambda arguments: 8.2 if arguments["weight_block_size"] == [128, 128] else 8.25,
    layer_kinds=frozenset({"linear", "expert"}),
    min_capability=80,
    check_shape=check_shape,
    sglang="mixedprec_plugin.methods.blockwise_int8.sglang",
    moe_kernels="triton",
    moe_backends=frozenset({"triton"}),
)
