"""Method `fp8`: e4m3 weights with one scale a tensor or a 128x128 block, and FP8 activations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

from mixedprec_plugin.methods import scaled, shapes
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

NAME = "fp8"
CODES = "F8_E4M3"
# measured on half a million normal numbers; with three bits of mantissa it hardly depends on scales
ERROR = 0.026
# 2**-4 for a weight at most
LIMIT = 0.0625

_STRATEGIES = {"row": "channel", "tensor": "tensor", "block": "block"}
# e4m3 arithmetic; below it `can_auto_enable_marlin_fp8` (fp8_utils.py:2794) is true from 80 on
_FP8_CAPABILITY = 89


def config_arguments(arguments: Arguments, _platform: str) -> dict[str, Any]:
    """Return the constructor arguments of `Fp8Config` for a serialized FP8 checkpoint.

    Only arguments that SGLang 0.5.11 to 0.5.23 take; the rest keep their defaults there.
    """
    return {
        "is_checkpoint_fp8_serialized": True,
        "activation_scheme": arguments["activation_scheme"],
        "ignored_layers": None,
        "weight_block_size": arguments["weight_block_size"],
    }


def read_config(config: Mapping[str, Any], name: str) -> Said:
    """Read what config.json says of a layer; experts may be in another format, which it names."""
    if config.get("moe_quant_algo") and ".experts." in name:
        return Said(label=str(config["moe_quant_algo"]))
    facts = scaled.block_facts(config)
    if strategy := _STRATEGIES.get(str(config.get("weight_scale_method"))):
        facts["strategy"] = strategy
    return Said(NAME, facts)


def stored(arguments: Arguments, N: int, K: int, _dtype: str) -> dict[str, TensorSpec]:
    """Return the stored tensors; W = weight * scale, and an "input_scale" where it is static.

    Without blocks every shard of a fused module keeps its own scale: SGLang spreads them over the
    channels (fp8.py:1213), and so does the CPU platform. Only on compute capability 12.x it rounds
    all shards again, to the largest of their scales (fp8.py:1249).

    Source: what `Fp8LinearMethod.create_fp8_weight_` registers for each shard
    (layers/quantization/fp8.py:658-714).
    """
    tensors = {"weight": TensorSpec(CODES, (N, K))}
    if block_size := arguments["weight_block_size"]:
        tensors["weight_scale_inv"] = TensorSpec("F32", shapes.grid(N, K, block_size))
    else:
        tensors["weight_scale"] = TensorSpec("F32", ())
    if arguments["activation_scheme"] == "static":
        tensors["input_scale"] = TensorSpec("F32", ())
    return tensors


def recognize(tensors: Tensors, said: Said) -> StoredFormat | None:
    """Take e4m3 codes beside one `weight_scale`, or a `weight_scale_inv` a block."""
    if found := scaled.recognize_served(tensors, said, CODES, "weight_scale_inv"):
        if found.facts["strategy"] != "block" or "input_scale" in tensors:
            return None
        arguments = {"weight_block_size": found.facts["block"], "activation_scheme": "dynamic"}
    elif found := scaled.recognize_served(tensors, said, CODES, "weight_scale"):
        # where activations are not quantized, `auto` alone serves a layer so
        has_inputs = said.of(NAME).get("inputs", {}) is not None
        if tensors["weight_scale"].shape not in ((), (1,)) or not has_inputs:
            return None
        activations = "static" if "input_scale" in tensors else "dynamic"
        arguments = {"weight_block_size": None, "activation_scheme": activations}
    else:
        return None
    return dataclasses.replace(found, method=NAME, arguments=arguments, like=NAME)


def faults(arguments: Arguments, shape: LayerShape, target: Target) -> list[Fault]:
    """Return what SGLang's FP8 methods refuse of a layer."""
    if block_size := arguments["weight_block_size"]:
        found = shapes.shape_faults(shapes.block_faults(block_size, shape))
    else:
        found = whole_scale_faults(shape, target)
    return found + _faults_without_units(shape, target)


def whole_scale_faults(shape: LayerShape, target: Target) -> list[Fault]:
    """Return what `apply_fp8_linear` refuses of a layer that has no blocks.

    Source: `torch._scaled_mm` takes multiples of 16 only; it is what a GPU without CUTLASS FP8 and
    an SM120 use (fp8_utils.py:2456, 2744, 2758). Others turn to a Triton kernel that takes any
    shape (fp8_utils.py:2545, 2652), which a plan cannot count on. Experts always run in such a
    kernel (kernels/ops/moe/fused_moe_triton_kernels.py:894).
    """
    if target.device != "cuda" or shape.is_expert:
        return []
    why = "which FP8 matmuls need"
    texts = shapes.input_faults(shape, 16, why) + shapes.output_faults(shape, 16, why)
    return shapes.shape_faults(texts)


def _faults_without_units(shape: LayerShape, target: Target) -> list[Fault]:
    """What a GPU without FP8 arithmetic does not run."""
    if target.gpu is None or target.gpu.capability >= _FP8_CAPABILITY:
        return []
    if shape.is_expert:
        # fp8.py:2221: Marlin only where --moe-runner-backend asks for it
        text = (
            "fp8 for experts runs in a Triton kernel with FP8 arithmetic, and the GPU's compute "
            f"capability is {version(target.gpu.capability)} (expected 8.9 or more)"
        )
    else:
        # the shards of a fused module are one matrix
        text = shapes.fp8_marlin_fault(
            sum(shapes.outputs_per_rank(shape)), shapes.inputs_per_rank(shape)
        )
    return [Fault("gpu", text)] if text else []


def kernel(arguments: Arguments, shape: LayerShape, capability: int) -> str:
    """Name the kernel of a linear layer.

    Source: layers/quantization/fp8.py:1193, 1300; `apply_fp8_linear` and
    `deepgemm_w8a8_block_fp8_linear_with_fallback` (fp8_utils.py:2456, 1044), which takes bfloat16
    and N in multiples of 64.
    """
    if capability < _FP8_CAPABILITY:
        return "Marlin"
    if arguments["weight_block_size"] is None:
        return "torch._scaled_mm" if capability // 10 == 12 else "fp8_scaled_mm"
    is_fit = shape.dtype == "BF16" and sum(shapes.outputs_per_rank(shape)) % 64 == 0
    return "DeepGEMM" if capability >= 90 and is_fit else "Triton block matmul"


def conflict(arguments: Arguments) -> str:
    """Source: `Fp8Config.__init__` (layers/quantization/fp8.py:311)."""
    if arguments["weight_block_size"] is not None and arguments["activation_scheme"] != "dynamic":
        return (
            f"activation_scheme: {arguments['activation_scheme']!r} does not go with "
            f"weight_block_size: {arguments['weight_block_size']!r} (expected 'dynamic')"
        )
    return ""


def why_not_quantize(arguments: Arguments) -> str:
    """A static activation scale is measured on sample inputs; there are none at load."""
    if arguments["activation_scheme"] == "static":
        return "activation_scheme: 'static' needs input scales that only a calibrated source has"
    return ""


METHOD = Method(
    name=NAME,
    title="8-bit floating point (e4m3), one scale a tensor or a 128x128 block",
    description="8-bit floating point (e4m3) weights, and activations quantized to FP8 at run "
    "time.",
    aliases={
        "fp8_e4m3": {},
        **{alias: {"weight_block_size": None} for alias in ("fp8_tensor", "fp8_per_tensor")},
        **{
            alias: {"weight_block_size": [128, 128]}
            for alias in ("fp8_block", "fp8_blockwise", "block_fp8")
        },
    },
    schema={
        "weight_block_size": choice(
            "[N, K] tile of the weight that shares a scale, with activations "
            "quantized in groups of 128; null: one scale for the whole weight, and one for each "
            "token's activations.",
            [None, [128, 128]],
        ),
        "activation_scheme": choice(
            "dynamic: activation scales are computed as tokens come. static: one "
            "scale a layer is taken from the source, which must hold input_scale; without blocks "
            "only.",
            ["dynamic", "static"],
        ),
    },
    stored=stored,
    recognize=recognize,
    read_config={NAME: read_config},
    declare=lambda arguments: {"quant_method": NAME, **arguments},
    faults=faults,
    rounding=lambda arguments: Rounding(
        rank=8.0 if arguments["weight_block_size"] is None else 8.1,
        limit=LIMIT,
        error=lambda _N, _K: ERROR,
    ),
    searched=({"weight_block_size": None}, {"weight_block_size": [128, 128]}),
    alternatives=(
        Alternative(NAME, ({"weight_block_size": None},)),
        Alternative("gptq", tuple({"bits": 8, **size} for size in GROUP_SIZES)),
        Alternative("int8_channel"),
        Alternative("blockwise_int8"),
        Alternative("awq"),
    ),
    config_classes={
        "cuda": "sglang.srt.layers.quantization.fp8:Fp8Config",
        "cpu": "mixedprec_plugin.methods.fp8.sglang:CpuFp8Config",
    },
    config_arguments=config_arguments,
    codec="mixedprec_plugin.methods.fp8.codec",
    min_capability=80,
    why_not_repack=partial(scaled.why_not_scaled, CODES),
    conflict=conflict,
    why_not_quantize=why_not_quantize,
    quantizes_parts=True,
    sglang="mixedprec_plugin.methods.fp8.sglang",
    kernel=kernel,
    moe_kernels="triton",
    moe_backends=frozenset(
        {"triton", "deep_gemm", "cutlass", "flashinfer_trtllm", "flashinfer_trtllm_routed"}
    ),
)
