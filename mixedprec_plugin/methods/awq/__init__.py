"""Method `awq`: 4-bit integers with zero points, interleaved nibbles; weight-only."""

from __future__ import annotations

from typing import Any

from mixedprec_plugin.methods import remedies
from mixedprec_plugin.methods.groups import group_faults, group_quality, num_groups
from mixedprec_plugin.methods.marlin import marlin_faults
from mixedprec_plugin.methods.partitions import outputs_per_rank, split_faults
from mixedprec_plugin.methods.spec import Arguments, LayerShape, MethodSpec, TensorSpec


def build(arguments: Arguments, platform: str) -> dict[str, Any]:
    """Return the constructor arguments of `AWQMarlinConfig` (`cuda`) or `AWQConfig` (the others).

    `AWQMarlinConfig` makes an `AWQConfig` from `full_config` for a layer that Marlin does not fit
    (awq/awq.py:368), and a `MoeWNA16Config` for such experts (awq.py:383).
    """
    flat = {
        "weight_bits": arguments["bits"],
        "group_size": arguments["group_size"],
        "zero_point": arguments["zero_point"],
        "modules_to_not_convert": None,
    }
    if platform != "cuda":
        return flat
    return {**flat, "lm_head_quantized": False, "full_config": quantization_config(arguments)}


def quantization_config(arguments: Arguments) -> dict[str, Any]:
    """Return what config.json's `quantization_config` says of such a checkpoint."""
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": arguments["bits"],
        "group_size": arguments["group_size"],
        "zero_point": arguments["zero_point"],
        "lm_head": False,
        "modules_to_not_convert": None,
    }


def stored(arguments: Arguments, N: int, K: int, dtype: str) -> dict[str, TensorSpec]:
    """Return the stored tensors.

    "qweight" int32 [K, N/8], "qzeros" int32 [K/G, N/8], "scales" [K/G, N];
    W = (qweight - qzeros) * scales, transposed.

    Source: `AWQLinearScheme.create_weights` (awq/schemes/awq_linear.py:54-89).
    """
    packed = 32 // arguments["bits"]
    groups = num_groups(K, arguments["group_size"])
    return {
        "qweight": TensorSpec("I32", (K, N // packed)),
        "qzeros": TensorSpec("I32", (groups, N // packed)),
        "scales": TensorSpec(dtype, (groups, N)),
    }


def fits_marlin(arguments: Arguments, shape: LayerShape) -> bool:
    """Whether Marlin kernels serve the layer on CUDA; if not, SGLang dequantizes it and multiplies.

    SGLang asks this of the whole layer: its method is chosen before the layer knows its share of a
    rank (linear.py:276).

    Source: `check_marlin_supports_layer` (marlin_utils.py:211), asked at awq/awq.py:368.
    """
    ranks = shape.tp_size if shape.parallel == "column" else 1
    N = sum(outputs_per_rank(shape)) * ranks
    whole = LayerShape(N=N, K=shape.K, shard_sizes=(N,), parallel="replicated")
    return not marlin_faults(arguments["group_size"], whole)


def faults(arguments: Arguments, shape: LayerShape, device: str) -> list[str]:
    """Return what SGLang's AWQ linear methods refuse of a layer.

    A layer that Marlin does not fit runs in the plain AWQ kernel, which dequantizes to fp16 or bf16
    whatever its shape (kernels/jit/csrc/gemm/awq_dequantize.cuh:196); `AWQConfig` says that it
    takes fp16 only (awq/awq.py:105), yet nobody asks it when `AWQMarlinConfig` makes one. A layer
    that fits as a whole and not in a rank's share is bound to Marlin all the same, and fails
    (awq/schemes/awq_marlin.py:49).

    A whole column as one group is Marlin's alone: the plain kernel's parameters divide by the group
    size, -1 (awq/schemes/awq_linear.py:69). Neither holds the scales of a column that is split over
    ranks: Marlin's find no group in a part of K (awq/schemes/awq_marlin.py:69).

    Experts that Marlin does not fit would be given to `MoeWNA16Method` (awq/awq.py:388), whose
    parameters are laid out otherwise; a column is never one group (awq/schemes/awq_moe.py:80).
    """
    group_size = arguments["group_size"]
    found = split_faults(shape)
    if found:
        return found
    found = group_faults(group_size, 32 // arguments["bits"], 1, shape)
    if shape.is_expert:
        if group_size == -1:
            return [*found, "group_size -1 is not served for experts, SGLang divides by it"]
        return found + (marlin_faults(group_size, shape) if device == "cuda" else [])
    if group_size == -1 and shape.parallel == "row" and shape.tp_size > 1:
        found.append(f"group_size -1 cannot be split over {shape.tp_size} ranks along K")
    if device == "cuda" and (group_size == -1 or fits_marlin(arguments, shape)):
        found += marlin_faults(group_size, shape)
    return found


def check_shape(arguments: Arguments, shape: LayerShape, device: str) -> list[tuple[str, str]]:
    """Return (text, remedy) for everything that keeps the layer from being served in AWQ."""
    return remedies.pair("awq", arguments, shape, device, faults(arguments, shape, device))


_CONFIG = "sglang.srt.layers.quantization.awq.awq:AWQConfig"
_MARLIN_CONFIG = "sglang.srt.layers.quantization.awq.awq:AWQMarlinConfig"

SPEC = MethodSpec(
    name="awq",
    title="4-bit integers with zero points in groups along K, AWQ layout",
    aliases={
        "awq_int4": {"bits": 4},
        "awq_4bit": {"bits": 4},
        "int4_awq": {"bits": 4},
        "awq_marlin": {},
    },
    defaults={"bits": 4, "group_size": 128, "zero_point": True, "clip_search": False},
    argument_schema="awq.schema.json",
    config_classes={
        "cuda": _MARLIN_CONFIG,
        "cuda_fallback": _CONFIG,
        "cpu": "mixedprec_plugin.methods.awq.sglang:CpuAWQConfig",
    },
    build=build,
    stored=stored,
    quantizer="mixedprec_plugin.methods.awq.codec:quantize",
    dequantizer="mixedprec_plugin.methods.awq.codec:dequantize",
    precision=lambda arguments: 4.5 + group_quality(arguments["group_size"]),
    layer_kinds=frozenset({"linear", "expert"}),
    min_capability=75,
    check_shape=check_shape,
    fallback_below=80,
    sglang="mixedprec_plugin.methods.awq.sglang",
    moe_kernels="marlin",
)
