"""Method `fp8`: e4m3 weights with one scale a tensor or a 128x128 block, and FP8 activations."""

from __future__ import annotations

from typing import Any

from mixedprec_plugin.methods import remedies
from mixedprec_plugin.methods.blocks import block_faults, grid
from mixedprec_plugin.methods.partitions import inputs_per_rank, outputs_per_rank, split_faults
from mixedprec_plugin.methods.spec import Arguments, LayerShape, MethodSpec, TensorSpec

_CLASS = "sglang.srt.layers.quantization.fp8:Fp8Config"


def build(arguments: Arguments, _platform: str) -> dict[str, Any]:
    """Return the constructor arguments of `Fp8Config` for a serialized FP8 checkpoint.

    Only arguments that SGLang 0.5.11 to 0.5.23 take; the rest keep their defaults there.
    """
    return {
        "is_checkpoint_fp8_serialized": True,
        "activation_scheme": arguments["activation_scheme"],
        "ignored_layers": None,
        "weight_block_size": arguments["weight_block_size"],
    }


def stored(arguments: Arguments, N: int, K: int, _dtype: str) -> dict[str, TensorSpec]:
    """Return the stored tensors.

    "weight" [N, K] e4m3, and "weight_scale" [] or, in blocks, "weight_scale_inv"
    [ceil(N/block_n), ceil(K/block_k)]; W = weight * scale. "input_scale" [] where activations have
    a static scale.

    Without blocks every shard of a fused module keeps its own scale: SGLang spreads them over the
    channels (fp8.py:1213), and so does the CPU platform. Only on compute capability 12.x it rounds
    all shards again, to the largest of their scales (fp8.py:1249).

    Source: what `Fp8LinearMethod.create_fp8_weight_` registers for each shard
    (layers/quantization/fp8.py:658-714).
    """
    tensors = {"weight": TensorSpec("F8_E4M3", (N, K))}
    block_size = arguments["weight_block_size"]
    if block_size is None:
        tensors["weight_scale"] = TensorSpec("F32", ())
    else:
        tensors["weight_scale_inv"] = TensorSpec("F32", grid(N, K, block_size))
    if arguments["activation_scheme"] == "static":
        tensors["input_scale"] = TensorSpec("F32", ())
    return tensors


def faults(arguments: Arguments, shape: LayerShape, device: str) -> list[str]:
    """Return what SGLang's FP8 linear method refuses of a layer.

    Source, per tensor: `torch._scaled_mm` takes multiples of 16 only; it is what a GPU without
    CUTLASS FP8 and an SM120 use (fp8_utils.py:2456, 2744, 2758). Others turn to a Triton kernel
    that takes any shape (fp8_utils.py:2545, 2652), which a plan cannot count on. Experts always run
    in such a kernel (kernels/ops/moe/fused_moe_triton_kernels.py:894).
    """
    found = split_faults(shape)
    if found:
        return found
    if arguments["weight_block_size"] is not None:
        return block_faults(arguments["weight_block_size"], shape)
    if device == "cuda" and not shape.is_expert:
        K, N = inputs_per_rank(shape), sum(outputs_per_rank(shape))
        for name, size in (("K", K), ("N", N)):
            if size % 16:
                found.append(f"{name} = {size} is not a multiple of 16, which FP8 matmuls need")
    return found


def check_shape(arguments: Arguments, shape: LayerShape, device: str) -> list[tuple[str, str]]:
    """Return (text, remedy) for everything that keeps the layer from being served in FP8."""
    return remedies.pair("fp8", arguments, shape, device, faults(arguments, shape, device))


def argument_conflict(arguments: Arguments) -> str:
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


SPEC = MethodSpec(
    name="fp8",
    title="8-bit floating point (e4m3), one scale a tensor or a 128x128 block",
    aliases={
        "fp8_e4m3": {},
        "fp8_tensor": {"weight_block_size": None},
        "fp8_per_tensor": {"weight_block_size": None},
        "fp8_block": {"weight_block_size": [128, 128]},
        "fp8_blockwise": {"weight_block_size": [128, 128]},
        "block_fp8": {"weight_block_size": [128, 128]},
    },
    defaults={"weight_block_size": None, "activation_scheme": "dynamic"},
    argument_schema="fp8.schema.json",
    config_classes={"cuda": _CLASS, "cpu": "mixedprec_plugin.methods.fp8.sglang:CpuFp8Config"},
    build=build,
    stored=stored,
    quantizer="mixedprec_plugin.methods.fp8.codec:quantize",
    dequantizer="mixedprec_plugin.methods.fp8.codec:dequantize",
    precision=lambda arguments: 8.0 if arguments["weight_block_size"] is None else 8.1,
    layer_kinds=frozenset({"linear", "expert"}),
    min_capability=80,
    check_shape=check_shape,
    argument_conflict=argument_conflict,
    why_not_quantize=why_not_quantize,
    sglang="mixedprec_plugin.methods.fp8.sglang",
    moe_kernels="triton",
    moe_backends=frozenset(
        {"triton", "deep_gemm", "cutlass", "flashinfer_trtllm", "flashinfer_trtllm_routed"}
    ),
)
