"""Method `bf16`: not quantized, in the dtype that the model runs in."""

from __future__ import annotations

from mixedprec_plugin.methods.interface import (
    Arguments,
    Fault,
    LayerShape,
    Method,
    Rounding,
    Target,
    choice,
)
from mixedprec_plugin.methods.stored import (
    FLOAT,
    FLOAT_DTYPES,
    Said,
    StoredFormat,
    Tensors,
    TensorSpec,
)

_STORED_DTYPES = {"bfloat16": "BF16", "float16": "F16"}
# 2**-9 for a weight at most, twice where it went through both float16 and bfloat16
_LIMIT = 0.01


def stored(arguments: Arguments, N: int, K: int, dtype: str) -> dict[str, TensorSpec]:
    """Return the stored tensors: "weight" [N, K], in `dtype` unless the arguments name another."""
    return {"weight": TensorSpec(_STORED_DTYPES.get(arguments["dtype"], dtype), (N, K))}


def recognize(tensors: Tensors, _said: Said) -> StoredFormat | None:
    """Take a [N, K] matrix of floats."""
    weight = tensors.get("weight")
    if weight is None or len(weight.shape) != 2 or weight.dtype not in FLOAT_DTYPES:
        return None
    dtype, suffixes = FLOAT_DTYPES[weight.dtype], frozenset({"weight"})
    return StoredFormat(
        METHOD.name, {"dtype": dtype}, *weight.shape, dtype, FLOAT, suffixes=suffixes, limit=_LIMIT
    )


def faults(arguments: Arguments, shape: LayerShape, _target: Target) -> list[Fault]:
    """Return what SGLang's unquantized linear layer refuses of a layer.

    Source: the layer's weight is created in the model's dtype, whatever the checkpoint holds
    (`UnquantizedLinearMethod.create_weights`, layers/quantization/unquant.py:560).
    """
    wanted = arguments["dtype"]
    if _STORED_DTYPES.get(wanted, shape.dtype) == shape.dtype:
        return []
    running = FLOAT_DTYPES.get(shape.dtype, shape.dtype)
    text = f"dtype {wanted} differs from the {running} the model runs in"
    return [Fault("shape", text, f"serve with --dtype {wanted}, or use method: unquantized")]


METHOD = Method(
    name="bf16",
    title="not quantized: 16-bit floating point",
    description="Not quantized. SGLang runs the whole model in one 16-bit dtype.",
    aliases={
        "bfloat16": {"dtype": "bfloat16"},
        "fp16": {"dtype": "float16"},
        "float16": {"dtype": "float16"},
        "unquantized": {"dtype": None},
        "none": {"dtype": None},
    },
    schema={
        "dtype": choice(
            "Dtype of the weights; must be the one that the model runs in. null "
            "stands for whatever that is. The method's names imply it: bf16 means bfloat16, fp16 "
            "float16, unquantized null.",
            ["bfloat16", "float16", None],
        )
    },
    stored=stored,
    recognize=recognize,
    declare=lambda _arguments: {},
    faults=faults,
    rounding=lambda _arguments: Rounding(rank=16.0, limit=_LIMIT),
    searched=(),
    sglang="mixedprec_plugin.methods.bf16.sglang",
    kernel=lambda _arguments, _shape, _capability: "mm",
    adds_expert_biases=True,
    moe_kernels="triton",
    moe_backends=frozenset(
        {"triton", "triton_kernel", "flashinfer_trtllm", "flashinfer_trtllm_routed"}
        | {"flashinfer_cutlass", "deep_gemm"}
    ),
)
