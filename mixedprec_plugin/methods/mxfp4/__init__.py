"""Method `mxfp4`: experts in 4-bit floating point (e2m1), a power of two for each 32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mixedprec_plugin.methods import shapes
from mixedprec_plugin.methods.integers import GROUP_SIZES, ROUNDING_SCHEMA
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

NAME = "mxfp4"
GROUP_SIZE = 32

_MATRIX = ("weight", "weight_scale")
# measured on a million normal numbers
_ERROR = 0.112
# of a number between two neighbours the error is a sixth at most, of one below 0.5 more
LIMIT = 0.2


def read_config(_config: Mapping[str, Any], name: str) -> Said:
    """Read what config.json says of a layer: experts are in MXFP4, and nothing else is."""
    if ".experts" not in name:
        return Said()
    return Said(NAME, {"group_size": GROUP_SIZE}, NAME)


def stored(_arguments: Arguments, N: int, K: int, _dtype: str) -> dict[str, TensorSpec]:
    """Return the stored tensors; W = q * 2^(weight_scale - 127).

    Source: `Mxfp4MoEMethod.create_weights` (layers/quantization/mxfp4.py:444).
    """
    return {
        "weight": TensorSpec("U8", (N, K // 2)),
        "weight_scale": TensorSpec("U8", (N, shapes.num_groups(K, GROUP_SIZE))),
    }


def recognize(tensors: Tensors, _said: Said) -> StoredFormat | None:
    """Take two codes a byte beside an exponent for each 32 of them."""
    if any(suffix not in tensors for suffix in _MATRIX):
        return None
    weight, scale = (tensors[suffix] for suffix in _MATRIX)
    if weight.dtype != "U8" or scale.dtype != "U8" or len(weight.shape) != 2:
        return None
    N, K = weight.shape[0], 2 * weight.shape[1]
    if scale.shape != (N, K // GROUP_SIZE) or K % GROUP_SIZE:
        return None
    return METHOD.holds({}, N, K, NAME, _MATRIX, numbers="fp4", facts={"group_size": GROUP_SIZE})


def faults(_arguments: Arguments, shape: LayerShape, target: Target) -> list[Fault]:
    """Return what SGLang's MXFP4 class refuses of a layer: all but experts, and parts of blocks.

    Source: `Mxfp4Config.get_quant_method` has no method for linear layers on CUDA (mxfp4.py:356).
    Of experts Marlin needs hidden sizes in multiples of 64, and pads the inner features of a rank,
    which are whole blocks (`check_moe_marlin_supports_layer`, marlin_utils.py:227).
    """
    if not shape.is_expert:
        return shapes.shape_faults(["SGLang runs MXFP4 in experts alone, not in linear layers"])
    hidden = (shapes.EXPERT_K, "which Marlin kernels for experts need")
    inner = (GROUP_SIZE, "the block that has a scale")
    is_down = shape.parallel == "row"
    if target.device != "cuda":
        return shapes.shape_faults(shapes.input_faults(shape, *inner))
    found = shapes.output_faults(shape, *(hidden if is_down else inner), of_each=True)
    found += shapes.input_faults(shape, *(inner if is_down else hidden))
    return shapes.shape_faults(found)


METHOD = Method(
    name=NAME,
    title="experts in 4-bit floating point (e2m1), a power of two for each 32",
    description="4-bit floating point (e2m1) weights of experts in blocks of 32 along K, with a "
    "power of two (e8m0) each, as gpt-oss and compressed-tensors store MXFP4; activations in "
    "bfloat16.",
    aliases={"mxfp4a16": {}, "w4a16_mxfp4": {}},
    schema={"rounding": ROUNDING_SCHEMA},
    stored=stored,
    recognize=recognize,
    read_config={NAME: read_config},
    # as of gpt-oss
    declare=lambda _arguments: {"quant_method": NAME},
    faults=faults,
    # a power of two fits a block less than other scales do
    rounding=lambda _arguments: Rounding(rank=4.3, limit=LIMIT, error=lambda _N, _K: _ERROR),
    alternatives=(
        Alternative("nvfp4"),
        Alternative("awq", GROUP_SIZES),
        Alternative("gptq", GROUP_SIZES),
        Alternative("fp8"),
    ),
    config_classes={
        "cuda": "mixedprec_plugin.methods.mxfp4.sglang:Mxfp4ExpertsConfig",
        "cpu": "mixedprec_plugin.methods.mxfp4.sglang:CpuMxfp4Config",
    },
    codec="mixedprec_plugin.methods.mxfp4.codec",
    # "MXFP4 Marlin requires SM90+" (mxfp4.py:655)
    min_capability=90,
    why_not_repack=lambda stored, _arguments, _tensors, _may_round: (
        "" if stored.numbers == "fp4" and stored.facts.get("group_size") == GROUP_SIZE else None
    ),
    sglang="mixedprec_plugin.methods.mxfp4.sglang",
    serves_linear=False,
    adds_expert_biases=True,
    moe_kernels="marlin",
    moe_backends=frozenset({"marlin"}),
)
