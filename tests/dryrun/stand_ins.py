"""Results, without numbers, of what fake tensors cannot pass through."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from tests.dryrun import humming_checks


def _scaled_mm(
    a: torch.Tensor, b: torch.Tensor, _sa: Any, _sb: Any, dtype: torch.dtype, _bias: Any = None
) -> torch.Tensor:
    assert a.shape[1] == b.shape[0], (a.shape, b.shape)
    return a.new_empty((a.shape[0], b.shape[1]), dtype=dtype)


def _packed_scales(scales: torch.Tensor, *_args: Any, **_keywords: Any) -> torch.Tensor:
    """[..., mn, k] -> int32 [..., mn, ceil(k/4)], mn-major, rows aligned to 4: DeepGEMM on 10.0."""
    mn, k = scales.shape[-2], scales.shape[-1]
    packed = scales.new_empty((*scales.shape[:-2], -(-k // 4), -(-mn // 4) * 4), dtype=torch.int32)
    return packed.transpose(-1, -2)[..., :mn, :]


def _aligned_scales(scales: torch.Tensor, *_args: Any, **_keywords: Any) -> torch.Tensor:
    """[..., mn, k] -> the same, mn-major, rows aligned to 4."""
    mn, k = scales.shape[-2], scales.shape[-1]
    aligned = scales.new_empty((*scales.shape[:-2], k, -(-mn // 4) * 4))
    return aligned.transpose(-1, -2)[..., :mn, :]


# compiled operators
STAND_INS: Mapping[str, Callable[..., Any]] = {
    "sgl_kernel::fp8_scaled_mm": _scaled_mm,
    "sgl_kernel::int8_scaled_mm": _scaled_mm,
    "deep_gemm::get_mn_major_tma_aligned_packed_ue8m0_tensor": _packed_scales,
    "deep_gemm::get_mn_major_tma_aligned_tensor": _aligned_scales,
    "humming::humming_gemm": humming_checks.gemm,
}


def _unpack_cols(words: torch.Tensor, bits: int, size_k: int, size_n: int) -> torch.Tensor:
    assert tuple(words.shape) == (size_k, size_n // (32 // bits)), (words.shape, size_k, size_n)
    return words.new_empty((size_k, size_n))


def _pack_cols(codes: torch.Tensor, bits: int, size_k: int, size_n: int) -> torch.Tensor:
    assert tuple(codes.shape) == (size_k, size_n), (codes.shape, size_k, size_n)
    return codes.new_empty((size_k, size_n // (32 // bits)), dtype=torch.int32)


def install() -> None:
    """Replace SGLang's packing of zero points, which goes through numpy, and humming's compiler."""
    humming_checks.install()
    from sglang.srt.layers.quantization import marlin_utils, utils

    from sglang.srt.hardware_backend.gpu.quantization import gptq_kernels  # isort: skip

    for module in (utils, marlin_utils, gptq_kernels):
        for name, stand_in in (("unpack_cols", _unpack_cols), ("pack_cols", _pack_cols)):
            if hasattr(module, name):
                setattr(module, name, stand_in)
