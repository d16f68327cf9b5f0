"""Method `gptq`: symmetric 4- or 8-bit integers in the GPTQ (v1) layout; weight-only."""

from __future__ import annotations

from typing import Any

from mixedprec_plugin.methods import remedies
from mixedprec_plugin.methods.groups import group_faults, group_quality, num_groups
from mixedprec_plugin.methods.marlin import marlin_faults
from mixedprec_plugin.methods.partitions import split_faults
from mixedprec_plugin.methods.spec import Arguments, LayerShape, MethodSpec, TensorSpec


def build(arguments: Arguments, _platform: str) -> dict[str, Any]:
    """Return the constructor arguments of `GPTQMarlinConfig`.

    `dynamic` stays empty: the plan decides layer by layer.
    """
    return {
        "weight_bits": arguments["bits"],
        "group_size": arguments["group_size"],
        "desc_act": has_order(arguments),
        "is_sym": arguments["sym"],
        "lm_head_quantized": False,
        "dynamic": {},
        "full_config": quantization_config(arguments),
    }


def has_order(arguments: Arguments) -> bool:
    """Whether groups follow an act order; one group a column has none, whatever is stored of it.

    Marlin refuses an order of one group
    (sglang/kernels/jit/csrc/gemm/marlin/gptq_marlin.cuh:924).
    """
    return bool(arguments["desc_act"]) and arguments["group_size"] != -1


def quantization_config(arguments: Arguments) -> dict[str, Any]:
    """Return what config.json's `quantization_config` says of such a checkpoint."""
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": arguments["bits"],
        "group_size": arguments["group_size"],
        "desc_act": has_order(arguments),
        "sym": arguments["sym"],
        "lm_head": False,
        "dynamic": {},
    }


def stored(arguments: Arguments, N: int, K: int, dtype: str) -> dict[str, TensorSpec]:
    """Return the stored tensors.

    "qweight" int32 [K/(32/bits), N], "qzeros" int32 [K/G, N/(32/bits)] holding zero - 1, "scales"
    [K/G, N], "g_idx" int32 [K]; W = (qweight - zero) * scales, transposed.

    Source: `GPTQMarlinLinearScheme.create_weights` (gptq/schemes/gptq_marlin.py:88-150).
    """
    packed = 32 // arguments["bits"]
    groups = num_groups(K, arguments["group_size"])
    return {
        "qweight": TensorSpec("I32", (K // packed, N)),
        "qzeros": TensorSpec("I32", (groups, N // packed)),
        "scales": TensorSpec(dtype, (groups, N)),
        "g_idx": TensorSpec("I32", (K,)),
    }


def faults(arguments: Arguments, shape: LayerShape, device: str) -> list[str]:
    """Return what SGLang's GPTQ Marlin linear method refuses of a layer.

    Marlin's limits are its own statement: `GPTQMarlinLinearKernel` asks for it and ignores the
    answer (gpu/quantization/gptq_kernels.py:89), so a layer outside of it may fail as late as in
    the first forward pass, or by luck not at all. Nobody asks for experts (gptq/gptq.py:447). With
    act order, a rank has the scales of its own columns and needs all (gptq_moe.py:198).
    """
    found = split_faults(shape)
    if found:
        return found
    packed = 32 // arguments["bits"]
    found = group_faults(arguments["group_size"], packed, packed, shape)
    if arguments["desc_act"] and shape.is_expert and shape.tp_size > 1:
        found.append(f"act order of experts cannot be split over {shape.tp_size} ranks")
    if device == "cuda":
        found += marlin_faults(arguments["group_size"], shape)
        if has_order(arguments) and arguments["group_size"] == shape.K:
            found.append(f"act order needs more than one group along K = {shape.K}")
    return found


def check_shape(arguments: Arguments, shape: LayerShape, device: str) -> list[tuple[str, str]]:
    """Return (text, remedy) for everything that keeps the layer from being served in GPTQ."""
    return remedies.pair("gptq", arguments, shape, device, faults(arguments, shape, device))


def precision(arguments: Arguments) -> float:
    """Eight bits rank above block INT8: finer scales, and activations are not quantized."""
    base = 8.3 if arguments["bits"] == 8 else 4.4
    return base + group_quality(arguments["group_size"])


def why_not_quantize(arguments: Arguments) -> str:
    """Act order sorts columns by activation size, which only calibration knows."""
    if arguments["desc_act"]:
        return "desc_act: true needs a source that was quantized with act order"
    return ""


SPEC = MethodSpec(
    name="gptq",
    title="symmetric 4- or 8-bit integers in groups along K, GPTQ layout",
    aliases={
        "gptq_int4": {"bits": 4},
        "gptq_4bit": {"bits": 4},
        "int4_gptq": {"bits": 4},
        "gptq_int8": {"bits": 8},
        "gptq_8bit": {"bits": 8},
        "int8_gptq": {"bits": 8},
        "gptq_marlin": {},
    },
    defaults={
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "desc_act": None,
        "clip_search": False,
    },
    argument_schema="gptq.schema.json",
    config_classes={
        "cuda": "sglang.srt.layers.quantization.gptq.gptq:GPTQMarlinConfig",
        "cpu": "mixedprec_plugin.methods.gptq.sglang:CpuGPTQConfig",
    },
    build=build,
    stored=stored,
    quantizer="mixedprec_plugin.methods.gptq.codec:quantize",
    dequantizer="mixedprec_plugin.methods.gptq.codec:dequantize",
    precision=precision,
    layer_kinds=frozenset({"linear", "expert"}),
    min_capability=80,
    check_shape=check_shape,
    why_not_quantize=why_not_quantize,
    sglang="mixedprec_plugin.methods.gptq.sglang",
    moe_kernels="marlin",
)
