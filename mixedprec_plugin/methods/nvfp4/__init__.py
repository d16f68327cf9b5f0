"""Method `nvfp4`: 4-bit floating point (e2m1) in blocks of 16, with e4m3 scales."""

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
    choice,
)
from mixedprec_plugin.methods.stored import Said, StoredFormat, Tensors, TensorSpec

NAME = "nvfp4"
GROUP_SIZE = 16

_MATRIX = ("weight", "weight_scale", "weight_scale_2")
# of ModelOpt's, and of compressed-tensors' checkpoints
_INPUTS = frozenset({"input_scale", "input_global_scale"})
_SCALARS = ((), (1,))
# measured on a million normal numbers
_ERROR = 0.082
# of a number between two neighbours the error is a sixth at most, of one below 0.5 more
LIMIT = 0.2
# FP4 arithmetic
_FP4_CAPABILITY = 100


def declare(arguments: Arguments) -> dict[str, Any]:
    """Return what ModelOpt writes into config.json."""
    return {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4" if arguments["keep_input_scale"] else "W4A16_NVFP4",
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
    """Return the stored tensors; W = q * weight_scale * weight_scale_2.

    Source: `ModelOptNvFp4A16LinearMethod.create_weights` (layers/quantization/modelopt_quant.py:
    2197).
    """
    tensors = {
        "weight": TensorSpec("U8", (N, K // 2)),
        "weight_scale": TensorSpec("F8_E4M3", (N, shapes.num_groups(K, GROUP_SIZE))),
        "weight_scale_2": TensorSpec("F32", ()),
    }
    if arguments["keep_input_scale"]:
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
    return METHOD.holds(
        {"keep_input_scale": inputs is not None},
        N,
        K,
        NAME if inputs is None else f"{NAME} with input scales",
        {*_MATRIX, "input_scale"} & tensors.keys(),
        numbers="fp4",
        facts={"group_size": GROUP_SIZE},
    )


def why_not_repack(
    stored: StoredFormat, arguments: Arguments, _tensors: Tensors, _may_round: bool
) -> str | None:
    """Say whether FP4 in blocks of 16 can be served so; input scales can be left, not made."""
    if stored.numbers != "fp4" or stored.facts.get("group_size") != GROUP_SIZE:
        return None
    has_inputs = stored.suffixes & _INPUTS
    return "it holds no input scales" if arguments["keep_input_scale"] and not has_inputs else ""


def why_not_quantize(arguments: Arguments) -> str:
    """An input scale is measured on sample inputs; there are none at load."""
    if arguments["keep_input_scale"]:
        return "keep_input_scale: true needs input scales, which only a calibrated source has"
    return ""


def faults(_arguments: Arguments, shape: LayerShape, target: Target) -> list[Fault]:
    """Return what SGLang's NVFP4 methods refuse of a layer.

    A linear layer needs whole blocks of inputs; what Marlin's tiles do not fit is padded
    (marlin_utils_fp4.py:149). Experts with a gate are not (:403).
    """
    found = shapes.input_faults(shape, GROUP_SIZE, "the block that has a scale")
    if not found and shape.is_expert and target.device == "cuda":
        found = shapes.marlin_faults(GROUP_SIZE, shape)
    return shapes.shape_faults(found)


def faults_as_stored(stored: StoredFormat, shape: LayerShape, target: Target) -> list[Fault]:
    """What SGLang's own class refuses of experts under `auto`.

    With input scales they run with activations in FP4 where the GPU has such arithmetic.
    """
    remedy = f"write method: {NAME}, to leave activations in 16 bits"
    has_units = target.gpu is not None and target.gpu.capability >= _FP4_CAPABILITY
    if shape.is_expert and has_units and stored.suffixes & _INPUTS:
        text = (
            "experts with input scales run in FlashInfer's kernels on compute capability 10.0 and "
            "up, which this release does not lay weights out for"
        )
        return [Fault("gpu", text, remedy)]
    return faults({}, shape, target)


METHOD = Method(
    name=NAME,
    title="4-bit floating point (e2m1) in blocks of 16 with FP8 scales",
    description="4-bit floating point (e2m1) weights in blocks of 16 along K, with e4m3 scales and "
    "one float32 scale, as ModelOpt and compressed-tensors store NVFP4; activations in 16 bits.",
    aliases={"nvfp4a16": {}, "w4a16_nvfp4": {}, "modelopt_fp4": {}},
    schema={
        "keep_input_scale": choice(
            "true: an input_scale that the source holds is kept, as convert writes it; false: it "
            "is left out. It is not computed with: activations stay in 16 bits on every GPU.",
            [False, True],
        ),
        "rounding": ROUNDING_SCHEMA,
    },
    stored=stored,
    recognize=recognize,
    read_config=dict.fromkeys(("modelopt", "modelopt_fp4", "modelopt_mixed"), read_config),
    declare=declare,
    faults=faults,
    faults_as_stored=faults_as_stored,
    # a block of 16 is nearer than integers in groups of 32, which have a zero point
    rounding=lambda _arguments: Rounding(rank=4.6, limit=LIMIT, error=lambda _N, _K: _ERROR),
    alternatives=(
        Alternative("awq", GROUP_SIZES),
        Alternative("gptq", GROUP_SIZES),
        Alternative("fp8"),
    ),
    config_classes={
        "cuda": "mixedprec_plugin.methods.nvfp4.sglang:NvFp4Config",
        "cpu": "mixedprec_plugin.methods.nvfp4.sglang:CpuNvFp4Config",
    },
    config_arguments=lambda arguments, _platform: {
        "keeps_input_scale": arguments["keep_input_scale"]
    },
    codec="mixedprec_plugin.methods.nvfp4.codec",
    min_capability=80,
    why_not_repack=why_not_repack,
    why_not_quantize=why_not_quantize,
    sglang="mixedprec_plugin.methods.nvfp4.sglang",
    kernel=lambda _arguments, _shape, _capability: "Marlin",
    serves_heads=True,
    moe_kernels="marlin",
    moe_backends=frozenset({"marlin"}),
)
