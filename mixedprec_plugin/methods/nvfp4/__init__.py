"""Method `nvfp4`: 4-bit floating point (e2m1) in blocks of 16, with e4m3 scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mixedprec_plugin.methods import shapes
from mixedprec_plugin.methods.cards import version
from mixedprec_plugin.methods.integers import GROUP_SIZES
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
from mixedprec_plugin.methods.stored import Said, StoredFormat, Tensors, TensorSpec

NAME = "nvfp4"
CODEC = "mixedprec_plugin.methods.nvfp4.codec"
GROUP_SIZE = 16

_MATRIX = ("weight", "weight_scale", "weight_scale_2")
_SCALARS = ((), (1,))
# measured on a million normal numbers
_ERROR = 0.082
# of a number between two neighbours the error is a sixth at most, of one below 0.5 more
LIMIT = 0.2
# FP4 arithmetic
_FP4_CAPABILITY = 100


def config_arguments(arguments: Arguments, _platform: str) -> dict[str, Any]:
    """Return the constructor arguments of `NvFp4Config`, or of its twin on the CPU."""
    return {"is_w4a16": arguments["activation_scheme"] == "none"}


def declare(arguments: Arguments) -> dict[str, Any]:
    """Return what ModelOpt writes into config.json."""
    is_weight_only = arguments["activation_scheme"] == "none"
    return {
        "quant_method": "modelopt",
        "quant_algo": "W4A16_NVFP4" if is_weight_only else "NVFP4",
        "group_size": GROUP_SIZE,
    }


def read_config(config: Mapping[str, Any], name: str) -> Said:
    """Read what ModelOpt says of a layer: one `quant_algo` for all, or one for each by name."""
    layers = config.get("quantized_layers")
    entry = layers.get(name) if isinstance(layers, Mapping) else None
    algorithm = str((entry if isinstance(entry, Mapping) else config).get("quant_algo") or "")
    if "NVFP4" not in algorithm.upper():
        return Said(label=algorithm)
    return Said(NAME, {"group_size": GROUP_SIZE}, algorithm)


def stored(arguments: Arguments, N: int, K: int, _dtype: str) -> dict[str, TensorSpec]:
    """Return the stored tensors.

    "weight" uint8 [N, K/2], "weight_scale" e4m3 [N, K/16], "weight_scale_2" [], W = q *
    weight_scale * weight_scale_2; "input_scale" [] where activations have a static scale.

    Source: `ModelOptNvFp4A16LinearMethod.create_weights` (layers/quantization/modelopt_quant.py:
    2197).
    """
    tensors = {
        "weight": TensorSpec("U8", (N, K // 2)),
        "weight_scale": TensorSpec("F8_E4M3", (N, shapes.num_groups(K, GROUP_SIZE))),
        "weight_scale_2": TensorSpec("F32", ()),
    }
    if arguments["activation_scheme"] == "static":
        tensors["input_scale"] = TensorSpec("F32", ())
    return tensors


def recognize(tensors: Tensors, _said: Said) -> StoredFormat | None:
    """Take two codes a byte beside an e4m3 scale for each 16 of them, and one for all."""
    if any(suffix not in tensors for suffix in _MATRIX):
        return None
    weight, scale, whole = (tensors[suffix] for suffix in _MATRIX)
    inputs = tensors.get("input_scale")
    if weight.dtype != "U8" or len(weight.shape) != 2 or scale.dtype != "F8_E4M3":
        return None
    N, K = weight.shape[0], 2 * weight.shape[1]
    is_scalar = all(t.shape in _SCALARS for t in (whole, inputs) if t is not None)
    if scale.shape != (N, K // GROUP_SIZE) or K % GROUP_SIZE or not is_scalar:
        return None
    scheme = "none" if inputs is None else "static"
    return StoredFormat(
        NAME,
        {"activation_scheme": scheme},
        N,
        K,
        "nvfp4" if inputs is None else "nvfp4 with input scales",
        encoding=NAME,
        numbers="fp4",
        facts={"group_size": GROUP_SIZE},
        suffixes=frozenset({*_MATRIX, "input_scale"} & tensors.keys()),
        codec=CODEC,
        how={"activation_scheme": scheme},
        like=NAME,
        limit=LIMIT,
    )


def why_not_repack(
    stored: StoredFormat, arguments: Arguments, _tensors: Tensors, _may_round: bool
) -> str | None:
    """Say whether FP4 in blocks of 16 can be served so; input scales can be left, not made."""
    if stored.numbers != "fp4" or stored.facts.get("group_size") != GROUP_SIZE:
        return None
    needs_inputs = arguments["activation_scheme"] == "static"
    if needs_inputs and stored.how.get("activation_scheme") != "static":
        return "it holds no input scales"
    return ""


def why_not_quantize(arguments: Arguments) -> str:
    """A static activation scale is measured on sample inputs; there are none at load."""
    if arguments["activation_scheme"] == "static":
        return "activation_scheme: 'static' needs input scales that only a calibrated source has"
    return ""


def faults(arguments: Arguments, shape: LayerShape, target: Target) -> list[Fault]:
    """Return what SGLang's NVFP4 methods refuse of a layer.

    A linear layer needs whole blocks of inputs; what Marlin's tiles do not fit is padded
    (marlin_utils_fp4.py:149). Experts with a gate are not (:403).
    """
    found = []
    inputs = shapes.inputs_per_rank(shape)
    if inputs % GROUP_SIZE:
        where = shapes.per_rank(shape, "row")
        found.append(f"K = {inputs}{where} is not a multiple of 16, the block that has a scale")
    elif shape.is_expert and target.device == "cuda":
        found += shapes.marlin_faults(GROUP_SIZE, shape)
    return shapes.shape_faults(found) + _static_faults(arguments, shape, target)


def _static_faults(arguments: Arguments, shape: LayerShape, target: Target) -> list[Fault]:
    """What activations in FP4 do not run on; older GPUs and the CPU leave them in 16 bits."""
    gpu, is_weight_only = target.gpu, arguments["activation_scheme"] == "none"
    if is_weight_only or gpu is None or gpu.capability < _FP4_CAPABILITY or not shape.is_expert:
        return []
    remedy = "write activation_scheme: none, to leave activations in 16 bits"
    text = (
        "experts with activations in FP4 run in FlashInfer's kernels on compute capability "
        f"{version(gpu.capability)}, which this release does not lay weights out for"
    )
    return [Fault("gpu", text, remedy)]


def kernel(arguments: Arguments, _shape: LayerShape, capability: int) -> str:
    """Source: `ModelOptNvFp4A16LinearMethod`, and `initialize_fp4_gemm_config` (fp4_utils.py)."""
    is_weight_only = arguments["activation_scheme"] == "none" or capability < _FP4_CAPABILITY
    return "Marlin" if is_weight_only else "FlashInfer mm_fp4"


METHOD = Method(
    name=NAME,
    title="4-bit floating point (e2m1) in blocks of 16 with FP8 scales",
    description="4-bit floating point (e2m1) in blocks of 16 along K, with e4m3 scales and one "
    "float32 scale, as ModelOpt and compressed-tensors store NVFP4.",
    aliases={
        **{alias: {"activation_scheme": "none"} for alias in ("nvfp4a16", "w4a16_nvfp4")},
        "modelopt_fp4": {},
    },
    schema={
        "activation_scheme": choice(
            "none: weight-only, activations stay in 16 bits. static: where the GPU has FP4 "
            "arithmetic (compute capability 10.0), activations are quantized to FP4 with the "
            "input_scale that the source must hold; elsewhere as none.",
            ["none", "static"],
        ),
    },
    stored=stored,
    recognize=recognize,
    read_config=dict.fromkeys(("modelopt", "modelopt_fp4", "modelopt_mixed"), read_config),
    declare=declare,
    faults=faults,
    # a block of 16 is nearer than integers in groups of 32, which have a zero point
    rounding=lambda _arguments: Rounding(rank=4.6, limit=LIMIT, error=lambda _N, _K: _ERROR),
    alternatives=(
        Alternative(NAME, ({"activation_scheme": "none"},)),
        Alternative("awq", GROUP_SIZES),
        Alternative("gptq", GROUP_SIZES),
        Alternative("fp8"),
    ),
    config_classes={
        "cuda": "mixedprec_plugin.methods.nvfp4.sglang:NvFp4Config",
        "cpu": "mixedprec_plugin.methods.nvfp4.sglang:CpuNvFp4Config",
    },
    config_arguments=config_arguments,
    codec=CODEC,
    min_capability=80,
    why_not_repack=why_not_repack,
    why_not_quantize=why_not_quantize,
    sglang="mixedprec_plugin.methods.nvfp4.sglang",
    kernel=kernel,
    serves_heads=True,
    moe_kernels="marlin",
    moe_backends=frozenset({"marlin"}),
)
