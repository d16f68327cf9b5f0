"""Method `awq`: 4-bit integers with zero points, interleaved nibbles; weight-only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mixedprec_plugin.methods import integers, shapes
from mixedprec_plugin.methods.cards import version
from mixedprec_plugin.methods.interface import (
    Alternative,
    Arguments,
    Fault,
    LayerShape,
    Method,
    Rounding,
    Target,
    choice,
)
from mixedprec_plugin.methods.stored import Said, StoredFormat, Tensors, TensorSpec, unusable

NAME = "awq"

_BITS, _PACK_FACTOR = 4, 8
# AWQ rounds to nearest, beside folded scales
_LIMIT = 0.25
_MARLIN_CAPABILITY = 80


def config_arguments(arguments: Arguments, platform: str) -> dict[str, Any]:
    """Return the constructor arguments of `AWQMarlinConfig` (`cuda`) or `AWQConfig` (the others).

    `AWQMarlinConfig` makes an `AWQConfig` from `full_config` for a layer that Marlin does not fit
    (awq/awq.py:368), and a `MoeWNA16Config` for such experts (awq.py:383).
    """
    declared = declare(arguments)
    flat = {
        "weight_bits": declared["bits"],
        **{key: declared[key] for key in ("group_size", "zero_point", "modules_to_not_convert")},
    }
    if platform != "cuda":
        return flat
    return {**flat, "lm_head_quantized": True, "full_config": declared}


def declare(arguments: Arguments) -> dict[str, Any]:
    return {
        "quant_method": NAME,
        "version": "gemm",
        "bits": arguments["bits"],
        "group_size": arguments["group_size"],
        "zero_point": arguments["zero_point"],
        "lm_head": False,
        "modules_to_not_convert": None,
    }


def read_config(config: Mapping[str, Any], _name: str) -> Said:
    facts = integers.config_facts(config)
    if "symmetric" not in facts and config.get("zero_point") is not None:
        facts["symmetric"] = not config["zero_point"]
    return Said(NAME, facts, ignores="within")


def stored(arguments: Arguments, N: int, K: int, dtype: str) -> dict[str, TensorSpec]:
    """Return the stored tensors; W = (qweight - qzeros) * scales, transposed.

    Source: `AWQLinearScheme.create_weights` (awq/schemes/awq_linear.py:54-89).
    """
    groups, words = shapes.num_groups(K, arguments["group_size"]), N // _PACK_FACTOR
    return {
        "qweight": TensorSpec("I32", (K, words)),
        "qzeros": TensorSpec("I32", (groups, words)),
        "scales": TensorSpec(dtype, (groups, N)),
    }


def recognize(tensors: Tensors, said: Said) -> StoredFormat | None:
    """Take a `qweight` whose words run along N; the dtype of the scales says nothing."""
    found = integers.packed_shapes(tensors)
    if found is None:
        return None
    version_name = str(said.config.get("version") or "gemm").lower()
    if said.encoding == NAME and version_name != "gemm":
        return unusable(tensors, f"awq {version_name}", encoding=NAME)
    (K, words), qzeros, (groups, N) = found
    if words * _PACK_FACTOR != N or qzeros != (groups, words):
        return None
    group_size = shapes.group_size_of(K, groups)
    if group_size is None:
        return integers.ragged(tensors, "awq 4-bit", N, K, groups, NAME)
    facts, how = {"bits": _BITS, "group_size": group_size}, {"group_size": group_size}
    arguments, label = {**facts, "zero_point": True}, f"awq 4-bit group {group_size}"
    return METHOD.holds(
        arguments, N, K, label, integers.PACKED, numbers="integers", facts=facts, how=how
    )


def why_not_repack(
    stored: StoredFormat, arguments: Arguments, _tensors: Tensors, _may_round: bool
) -> str | None:
    """Say why integers in groups cannot be those of AWQ, which have no order."""
    reason = integers.why_not_integers(stored, arguments)
    if reason == "" and stored.said.get("desc_act"):
        return "its groups are in act order"
    return reason


def fits_marlin(arguments: Arguments, shape: LayerShape) -> bool:
    """Whether Marlin kernels serve the layer on CUDA; if not, SGLang dequantizes it and multiplies.

    SGLang asks this of the whole layer: its method is chosen before the layer knows its share of a
    rank (linear.py:276).

    Source: `check_marlin_supports_layer` (marlin_utils.py:211), asked at awq/awq.py:368.
    """
    ranks = shape.tp_size if shape.parallel == "column" else 1
    N = sum(shapes.outputs_per_rank(shape)) * ranks
    whole = LayerShape(N=N, K=shape.K, shard_sizes=(N,), parallel="replicated")
    return not shapes.marlin_faults(arguments["group_size"], whole)


def faults(arguments: Arguments, shape: LayerShape, target: Target) -> list[Fault]:
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
    found = shapes.group_faults(group_size, _PACK_FACTOR, 1, shape)
    on_cuda = target.device == "cuda"
    if shape.is_expert and group_size == -1:
        found.append("group_size -1 is not served for experts, SGLang divides by it")
    elif shape.is_expert:
        found += shapes.marlin_faults(group_size, shape) if on_cuda else []
    else:
        if group_size == -1 and shape.parallel == "row" and shape.tp_size > 1:
            found.append(f"group_size -1 cannot be split over {shape.tp_size} ranks along K")
        # the plain class has no method for lm_head (awq/awq.py:160)
        if on_cuda and (group_size == -1 or shape.is_head or fits_marlin(arguments, shape)):
            found += shapes.marlin_faults(group_size, shape)
    return shapes.shape_faults(found) + _without_marlin(arguments, shape, target)


def _without_marlin(arguments: Arguments, shape: LayerShape, target: Target) -> list[Fault]:
    """What plain AWQ, on GPUs without Marlin (marlin_utils.py:83), does not run."""
    if target.gpu is None or target.gpu.capability >= _MARLIN_CAPABILITY:
        return []
    marlin = (
        "runs in Marlin kernels, and the GPU's compute capability is "
        f"{version(target.gpu.capability)} (expected 8.0 or more)"
    )
    found = {
        # awq/awq.py:139 has no method for FusedMoE, and leaves its experts unquantized
        f"awq for experts {marlin}": shape.is_expert,
        # awq/awq.py:105
        "awq does not run in bfloat16 on this GPU (expected float16)": shape.dtype != "F16",
        # awq/schemes/awq_linear.py:69 divides by the group size
        f"awq with group_size -1 {marlin}": arguments["group_size"] == -1,
        f"awq for lm_head {marlin}": shape.is_head,
    }
    return [Fault("gpu", text) for text, is_so in found.items() if is_so]


def kernel(arguments: Arguments, shape: LayerShape, capability: int) -> str:
    """Source: `AWQMarlinConfig.get_quant_method` (awq/awq.py:383), as `faults` says."""
    is_marlin = capability >= _MARLIN_CAPABILITY and fits_marlin(arguments, shape)
    return "Marlin" if is_marlin else "awq_dequantize + mm"


def rounding(arguments: Arguments) -> Rounding:
    """A step is the range of a group over 15."""
    size = arguments["group_size"]
    return Rounding(
        rank=4.5 + integers.group_rank(size),
        limit=integers.limit(_BITS, size, _LIMIT),
        error=lambda _N, K: integers.asymmetric_error(_BITS, integers.elements(size, K)),
    )


METHOD = Method(
    name=NAME,
    title="4-bit integers with zero points in groups along K, AWQ layout",
    description="4-bit integers with zero points in groups along K, in AWQ's layout. Weight-only: "
    "activations stay in 16 bits.",
    aliases={
        **{alias: {"bits": 4} for alias in ("awq_int4", "awq_4bit", "int4_awq")},
        "awq_marlin": {},
    },
    schema={
        "bits": choice("Bits a weight; SGLang serves AWQ in 4 only.", [4]),
        "group_size": integers.GROUP_SIZE_SCHEMA,
        "zero_point": choice(
            "Each group has a zero point; SGLang's AWQ kernels always read one.", [True]
        ),
        "rounding": integers.ROUNDING_SCHEMA,
    },
    stored=stored,
    recognize=recognize,
    read_config={NAME: read_config},
    declare=declare,
    faults=faults,
    rounding=rounding,
    serves_heads=True,
    searched=tuple({"group_size": size} for size in (128, 64, 32)),
    alternatives=(
        Alternative(NAME, integers.GROUP_SIZES),
        Alternative("gptq", integers.GROUP_SIZES),
        Alternative("fp8"),
        Alternative("int8_channel"),
        Alternative("blockwise_int8"),
    ),
    config_classes={
        "cuda": "sglang.srt.layers.quantization.awq.awq:AWQMarlinConfig",
        "cuda_fallback": "sglang.srt.layers.quantization.awq.awq:AWQConfig",
        "cpu": "mixedprec_plugin.methods.awq.sglang:CpuAWQConfig",
    },
    config_arguments=config_arguments,
    codec="mixedprec_plugin.methods.awq.codec",
    fallback_below=_MARLIN_CAPABILITY,
    why_not_repack=why_not_repack,
    # SGLang's class asks, and has another kernel for what Marlin does not take (awq.py:383)
    faults_as_stored=lambda _stored, _shape, _target: [],
    quantizes_parts=True,
    sglang="mixedprec_plugin.methods.awq.sglang",
    kernel=kernel,
    moe_kernels="marlin",
)
