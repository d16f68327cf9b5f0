"""Method `blockwise_int8`: 8-bit integer weights, a scale a block, and INT8 activations."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

from mixedprec_plugin.methods import scaled
from mixedprec_plugin.methods.integers import GROUP_SIZES, largest
from mixedprec_plugin.methods.interface import Alternative, Arguments, Method, Rounding, choice
from mixedprec_plugin.methods.shapes import block_faults, grid, shape_faults
from mixedprec_plugin.methods.stored import Said, StoredFormat, Tensors, TensorSpec

NAME = "blockwise_int8"
CODES = "I8"

# a step is 2 * top / 255, and top / RMS is 4 to 20 for a block of a real layer
_LIMIT = 0.05


def config_arguments(arguments: Arguments, _platform: str) -> dict[str, Any]:
    """Return the constructor arguments of `BlockInt8Config` for a serialized INT8 checkpoint."""
    return {
        "is_checkpoint_int8_serialized": True,
        "activation_scheme": arguments["activation_scheme"],
        "ignored_layers": None,
        "weight_block_size": arguments["weight_block_size"],
    }


def stored(arguments: Arguments, N: int, K: int, _dtype: str) -> dict[str, TensorSpec]:
    """Return the stored tensors; W = weight * weight_scale_inv.

    Source: `BlockInt8LinearMethod.create_weights` (layers/quantization/blockwise_int8.py:188-216).
    """
    return {
        "weight": TensorSpec(CODES, (N, K)),
        "weight_scale_inv": TensorSpec("F32", grid(N, K, arguments["weight_block_size"])),
    }


def recognize(tensors: Tensors, said: Said) -> StoredFormat | None:
    """Take int8 codes beside a `weight_scale_inv` a block."""
    found = scaled.recognize_served(tensors, said, CODES, "weight_scale_inv")
    if found is None or found.facts["strategy"] != "block" or "input_scale" in tensors:
        return None
    arguments = {"weight_block_size": found.facts["block"]}
    return dataclasses.replace(found, method=NAME, arguments=arguments, like=NAME)


def rounding(arguments: Arguments) -> Rounding:
    """A step is the largest magnitude of a block over 127."""
    block_n, block_k = arguments["weight_block_size"]
    return Rounding(
        rank=8.2 if [block_n, block_k] == [128, 128] else 8.25,
        limit=_LIMIT,
        error=lambda N, K: largest(min(N, block_n) * min(K, block_k)) / 127 / math.sqrt(12),
    )


METHOD = Method(
    name=NAME,
    title="8-bit integers, one scale a block",
    description="8-bit integer weights with one scale a block, and activations quantized to INT8 "
    "at run time, in groups as long as the block.",
    aliases={"int8": {}, "int8_block": {}, "int8_blockwise": {}, "block_int8": {}},
    schema={
        "weight_block_size": choice(
            "[N, K] tile of the weight that shares a scale. Smaller blocks fit more "
            "shapes and are more precise.",
            [[128, 128], [64, 64]],
        ),
        "activation_scheme": choice(
            "dynamic: activation scales are computed as tokens come; SGLang has no other.",
            ["dynamic"],
        ),
    },
    stored=stored,
    recognize=recognize,
    read_config={NAME: lambda config, _name: Said("int8", scaled.block_facts(config))},
    declare=lambda arguments: {"quant_method": NAME, **arguments},
    faults=lambda arguments, shape, _target: shape_faults(
        block_faults(arguments["weight_block_size"], shape)
    ),
    rounding=rounding,
    alternatives=(
        Alternative(NAME, ({"weight_block_size": [64, 64]},)),
        Alternative("int8_channel"),
        Alternative("fp8"),
        Alternative("gptq", tuple({"bits": 8, **size} for size in GROUP_SIZES)),
        Alternative("awq"),
    ),
    config_classes={
        "cuda": "sglang.srt.layers.quantization.blockwise_int8:BlockInt8Config",
        "cpu": "mixedprec_plugin.methods.blockwise_int8.sglang:CpuBlockInt8Config",
    },
    config_arguments=config_arguments,
    codec="mixedprec_plugin.methods.blockwise_int8.codec",
    min_capability=80,
    why_not_repack=partial(scaled.why_not_scaled, CODES),
    quantizes_parts=True,
    sglang="mixedprec_plugin.methods.blockwise_int8.sglang",
    kernel=lambda _arguments, _shape, _capability: "Triton block matmul",
    moe_kernels="triton",
    moe_backends=frozenset({"triton"}),
)
