"""Method `bf16`: not quantized, in the dtype that the model runs in."""

from __future__ import annotations

from typing import Any

from mixedprec_plugin.methods.partitions import split_faults
from mixedprec_plugin.methods.spec import Arguments, LayerShape, MethodSpec, TensorSpec

_STORED_DTYPES = {"bfloat16": "BF16", "float16": "F16"}


def build(_arguments: Arguments, _platform: str) -> dict[str, Any]:
    """Return no arguments: there is no config class, SGLang's unquantized methods serve it."""
    return {}


def stored(arguments: Arguments, N: int, K: int, dtype: str) -> dict[str, TensorSpec]:
    """Return the stored tensors: "weight" [N, K], in `dtype` unless the arguments name another."""
    return {"weight": TensorSpec(_STORED_DTYPES.get(arguments["dtype"], dtype), (N, K))}


def faults(arguments: Arguments, shape: LayerShape, _device: str) -> list[str]:
    """Return what SGLang's unquantized linear layer refuses of a layer.

    Source: the layer's weight is created in the model's dtype, whatever the checkpoint holds
    (`UnquantizedLinearMethod.create_weights`,
    layers/quantization/unquant.py:560).
    """
    wanted = _STORED_DTYPES.get(arguments["dtype"], shape.dtype)
    found = split_faults(shape)
    if wanted != shape.dtype:
        names = {stored: name for name, stored in _STORED_DTYPES.items()}
        running = names.get(shape.dtype, shape.dtype)
        found.append(f"dtype {arguments['dtype']} differs from the {running} the model runs in")
    return found


def check_shape(arguments: Arguments, shape: LayerShape, device: str) -> list[tuple[str, str]]:
    """Return (text, remedy) for everything that keeps the layer from being served unquantized."""
    wanted = arguments["dtype"]
    return [
        (
            text,
            f"serve with --dtype {wanted}, or use method: unquantized"
            if text.startswith("dtype")
            else "use a tensor-parallel size that divides it",
        )
        for text in faults(arguments, shape, device)
    ]


SPEC = MethodSpec(
    name="bf16",
    title="not quantized: 16-bit floating point",
    aliases={
        "bfloat16": {"dtype": "bfloat16"},
        "fp16": {"dtype": "float16"},
        "float16": {"dtype": "float16"},
        "unquantized": {"dtype": None},
        "none": {"dtype": None},
    },
    defaults={"dtype": "bfloat16"},
    argument_schema="bf16.schema.json",
    config_classes={},
    build=build,
    stored=stored,
    quantizer="",
    dequantizer="",
    precision=lambda _arguments: 16.0,
    layer_kinds=frozenset({"linear", "expert", "lm_head"}),
    min_capability=75,
    check_shape=check_shape,
    sglang="mixedprec_plugin.methods.bf16.sglang",
    moe_kernels="triton",
    moe_backends=frozenset(
        {"triton", "triton_kernel", "flashinfer_trtllm", "flashinfer_trtllm_routed"}
        | {"flashinfer_cutlass", "deep_gemm"}
    ),
)
