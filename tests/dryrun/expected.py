"""What each cell is, by SGLang's sources; below sglang/srt, line numbers of 0.5.23."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from tests.dryrun.cards import Card
from tests.dryrun.methods import Method

# layers/quantization/marlin_utils_fp8.py and gpu/quantization/gptq_kernels.py: one matmul
_MARLIN = ("jit:gptq_marlin_gemm",)
# layers/quantization/fp8_utils.py, `apply_fp8_linear` with CUTLASS: fp8_utils.py:2456
_FP8 = ("jit:per_token_quant_fp8", "sgl_kernel:fp8_scaled_mm")
# fp8_utils.py, `deepgemm_w8a8_block_fp8_linear_with_fallback`; takes bfloat16 and N in multiples of
# 64, and falls back to Triton: fp8_utils.py:1044
_FP8_BLOCK_DEEPGEMM = ("jit:per_token_group_quant", "deep_gemm:fp8_fp4_gemm_nt")
# fp8_utils.py, `triton_w8a8_block_fp8_linear`
_FP8_BLOCK_TRITON = ("jit:per_token_group_quant", "triton:_w8a8_block_fp8_matmul")
# fp8_utils.py:2613, `static_quant_fp8`
_FP8_STATIC = ("triton:_static_quant_fp8", "sgl_kernel:fp8_scaled_mm")
# fp8.py:1193: on SM120 one scale for the whole module, and torch's matmul
_SCALED_MM = "aten:_scaled_mm"
# layers/quantization/int8_utils.py, `apply_w8a8_block_int8_linear`
_INT8_BLOCK = ("triton:_per_token_group_quant_int8", "triton:_w8a8_block_int8_matmul")
# layers/quantization/w8a8_int8.py
_INT8_CHANNEL = ("triton:_per_token_quant_int8", "sgl_kernel:int8_scaled_mm")
# gpu/quantization/awq_kernels.py, `AWQLinearKernel.apply`
_AWQ_PLAIN = ("jit:awq_dequantize", "aten:mm")

# Shapes that no card takes. "narrow" has 32 outputs a rank at tensor parallel 8; "ragged" 1056 in
# all, 528 and 132 a rank. Blocks: fp8.py:570, blockwise_int8.py:162, a lone unsplit layer may be
# ragged; Marlin: marlin_utils.py:161, multiples of 64; AWQ and GPTQ: whole words of 8 or 4;
# FP8 a tensor: multiples of 16.
_BLOCKS = {("narrow", 8), ("ragged", 2), ("ragged", 8)}
_GPTQ = {("narrow", 8), ("ragged", 1), ("ragged", 2), ("ragged", 8)}
_NO_CARD: Mapping[str, set[tuple[str, int]]] = {
    "unquantized": set(),
    "fp8": {("ragged", 8)},
    "fp8_static": {("ragged", 8)},
    "fp8_block": _BLOCKS,
    "fp8_channel": {("ragged", 8)},
    "blockwise_int8": _BLOCKS,
    "int8_channel": {("ragged", 8)},
    "awq": {("narrow", 8), ("ragged", 8)},
    "gptq_int4": _GPTQ,
    "gptq_int8": _GPTQ,
    "gptq_column": _GPTQ,
    "gptq_act_order": _GPTQ,
    # what its tiles do not fit is padded: quantization/humming.py:951; 132 outputs are no vectors
    "humming_int3": {("ragged", 8)},
    # what Marlin's tiles do not fit is padded: marlin_utils_fp4.py:149
    "nvfp4": set(),
}
# FP8 before 8.9 goes through Marlin (fp8.py:1300), so its shapes are Marlin's
_NOT_IN_MARLIN = _GPTQ
# get_min_capability: fp8.py:329, w8a8_fp8.py:66, blockwise_int8.py:83, gptq/gptq.py:386,
# awq/awq.py:109
_LEAST = {"unquantized": 0, "awq": 75, "humming_int3": 75, "fp8_channel": 89}

# What SGLang asks the numbers of shards' scales, which are fake, and we before it: whether all are
# one, which `test_shared_scale.py` shows for real ones. Where they are not, SGLang warns.
SHARED_SCALES = frozenset({"_local_scalar_dense", "_unique2", "allclose"})


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a cell must be: a class and its kernels, or a refusal whose text holds `refused`."""

    runs_as: str = ""
    kernels: tuple[str, ...] = ()
    refused: str = ""


def expect(card: Card, method: Method, kind: str, tp_size: int, dtype: str) -> Expected:
    """Tell what a cell must be."""
    name = method.title
    if kind == "lm_head" and name == "fp8_static":
        return Expected(refused="needs input scales")
    if kind == "lm_head" and not name.startswith(("unquantized", "awq", "gptq", "nvfp4")):
        return Expected(refused="SGLang leaves lm_head unquantized in")
    if kind == "lm_head" and name == "awq" and card.architecture < 80:
        # AWQConfig has no method for it: awq/awq.py:160
        return Expected(refused="SGLang would leave it unquantized, not in awq")
    if (kind, tp_size) in _NO_CARD[name]:
        return Expected(refused="multiple of")
    least = _LEAST.get(name, 80)
    if card.architecture < least:
        capability, needed = card.architecture / 10, least / 10
        return Expected(refused=f"compute capability is {capability} (expected {needed}")
    if name == "int8_channel" and card.architecture > 90:
        # sgl-kernel/csrc/gemm/int8_gemm_kernel.cu
        return Expected(refused="has no kernel for this GPU")
    if name in ("awq", "humming_int3") and card.architecture < 80 and dtype == "bfloat16":
        # AWQConfig: awq/awq.py:105; humming-kernels: humming/kernel/humming.py:378
        return Expected(refused="does not run in bfloat16")
    if name.startswith("fp8") and card.architecture < 89 and (kind, tp_size) in _NOT_IN_MARLIN:
        return Expected(refused="FP8 runs in Marlin kernels on this GPU")
    runs_as, kernels = _kernels(card, name, kind, dtype)
    if kind == "row" and tp_size > 1:
        kernels = (*kernels, "ranks:all_reduce")
    return Expected(runs_as, kernels)


def _kernels(card: Card, name: str, kind: str, dtype: str) -> tuple[str, tuple[str, ...]]:
    if name == "unquantized":
        if kind == "lm_head":
            return "UnquantizedEmbeddingMethod", ("aten:mm",)
        has_bias = kind in ("qkv", "few_kv_heads")
        return "UnquantizedLinearMethod", ("aten:addmm" if has_bias else "aten:mm",)
    if name in ("fp8", "fp8_static"):
        return "Fp8LinearMethod", _fp8(card, name)
    if name == "fp8_channel":
        return "W8A8Fp8LinearMethod", _FP8
    if name == "fp8_block":
        return "Fp8LinearMethod", _fp8_block(card, kind, dtype)
    if name == "blockwise_int8":
        return "BlockInt8LinearMethod", _INT8_BLOCK
    if name == "int8_channel":
        return "W8A8Int8LinearMethod", _INT8_CHANNEL
    if name == "humming_int3":
        return "HummingLinearMethod", ("humming:humming_gemm",)
    if name == "nvfp4":
        return "ModelOptNvFp4A16LinearMethod", _MARLIN
    if name == "awq":
        if card.architecture < 80 or kind == "ragged":
            return "AWQLinearMethod/AWQLinearScheme", _AWQ_PLAIN
        return "AWQLinearMethod/AWQMarlinLinearScheme", _MARLIN
    return "GPTQMarlinLinearMethod/GPTQMarlinLinearScheme", _MARLIN


def _fp8(card: Card, name: str) -> tuple[str, ...]:
    """Marlin takes the activations as they are, static scales or not: fp8.py:1304."""
    if card.architecture < 89:
        return _MARLIN
    quantize, matmul = _FP8_STATIC if name == "fp8_static" else _FP8
    return quantize, _SCALED_MM if card.architecture == 120 else matmul


def _fp8_block(card: Card, kind: str, dtype: str) -> tuple[str, ...]:
    """DeepGEMM is for Hopper and Blackwell, bfloat16, and N in multiples of 64."""
    if card.architecture < 89:
        return _MARLIN
    fits = kind != "ragged" and dtype == "bfloat16"
    return (
        _FP8_BLOCK_DEEPGEMM if card.architecture in (90, 100, 120) and fits else _FP8_BLOCK_TRITON
    )
