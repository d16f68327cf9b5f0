"""The arithmetic of the CPU platform against SGLang's kernels on a real GPU.

`tests/cpu/test_against_triton.py` compares with the same Triton kernels in Triton's interpreter. A
GPU divides faster and less exactly, and adds products of FP8 in fewer bits; what is exact stays so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mixedprec_plugin.cpu import activation
from mixedprec_plugin.cpu.packed import dequantize
from mixedprec_plugin.cpu.scaled_matmul import block_matmul, channel_matmul
from mixedprec_plugin.quantize.packing import unpack_awq
from tests.gpu.exact import ROUNDING, Off, compare

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    # what SGLang and the compilers of its kernels warn of on a GPU is not ours
    pytest.mark.filterwarnings("ignore"),
]
DEVICE = "cuda"
WIDTHS = (640, 768, 1536)
# tokens, N, K of SmolLM2-135M's layers, as it is and widened
SHAPES = [(1, 640, 768), (5, 576, 768), (3, 192, 1536), (17, 1536, 768), (256, 1280, 768)]
BLOCK = (128, 128)
Codes = tuple[torch.Tensor, torch.Tensor]
# What divisions by approximation (two units in the last place each), their reciprocals and products
# are off by at most, relative.
_SLACK = 2**-20
# Hopper adds 32 products of FP8 at a time, and keeps 13 bits below the greatest.
_FP8_SUM = 2**-13 / 32


def spread(num_rows: int, num_columns: int) -> torch.Tensor:
    """Normal numbers of magnitudes from 2**-12 to 2**6, in bfloat16; the first row is zero."""
    generator = torch.Generator().manual_seed(num_columns)
    exponents = torch.randint(-12, 7, (num_rows, 1), generator=generator).float()
    values = torch.randn(num_rows, num_columns, generator=generator) * exponents.exp2()
    values[0] = 0
    return values.bfloat16()


def _int8_linear(x: torch.Tensor) -> Codes:
    from sglang.kernels.ops.quantization.int8_kernel import per_token_group_quant_int8

    found: Codes = per_token_group_quant_int8(x, 128)
    return found


def _int8_cuda(x: torch.Tensor) -> Codes:
    from sglang.kernels.ops.quantization.int8_kernel import sglang_per_token_group_quant_int8

    found: Codes = sglang_per_token_group_quant_int8(x, 128)
    return found


def _fp8_cuda(x: torch.Tensor) -> Codes:
    from sglang.kernels.ops.quantization.fp8_kernel import sglang_per_token_group_quant_fp8

    found: Codes = sglang_per_token_group_quant_fp8(x, 128)
    return found


def _fp8_columns(x: torch.Tensor) -> Codes:
    """With scales in columns, as DeepGEMM takes them."""
    from sglang.kernels.ops.quantization.fp8_kernel import sglang_per_token_group_quant_fp8

    found: Codes = sglang_per_token_group_quant_fp8(
        x, 128, column_major_scales=True, scale_tma_aligned=True
    )
    return found


def _fp8_triton(x: torch.Tensor) -> Codes:
    from sglang.kernels.ops.quantization.fp8_kernel import _per_token_group_quant_8bit_raw

    found: Codes = _per_token_group_quant_8bit_raw(x, 128)
    return found


def _fp8_tokens(x: torch.Tensor) -> Codes:
    from sglang.kernels.ops.quantization.fp8_kernel import sglang_per_token_quant_fp8

    found: Codes = sglang_per_token_quant_fp8(x)
    return found


def _int8_tokens(x: torch.Tensor) -> Codes:
    from sglang.kernels.ops.quantization.int8_kernel import per_token_quant_int8

    found: Codes = per_token_quant_int8(x)
    return found


def _fp8_static(x: torch.Tensor) -> Codes:
    from sglang.kernels.ops.quantization.fp8_kernel import static_quant_fp8

    found: Codes = static_quant_fp8(x, torch.tensor([0.0123], device=x.device))
    return found


def _our_static(x: torch.Tensor) -> Codes:
    scale = torch.tensor([0.0123])
    return activation.quantize_fp8_static(x, scale), scale


def _our_int8(x: torch.Tensor) -> Codes:
    return activation.quantize_int8_groups(x, 128)


def _our_fp8(x: torch.Tensor) -> Codes:
    return activation.quantize_fp8_groups(x, 128)


# name -> SGLang's, ours
QUANTIZERS: dict[str, tuple[Callable[..., Codes], Callable[..., Codes]]] = {
    "INT8 groups, Triton": (_int8_linear, _our_int8),
    "INT8 groups, CUDA": (_int8_cuda, _our_int8),
    "INT8 tokens, Triton": (_int8_tokens, activation.quantize_int8_tokens),
    "FP8 groups, Triton": (_fp8_triton, _our_fp8),
    "FP8 groups, CUDA": (_fp8_cuda, _our_fp8),
    "FP8 groups, CUDA, scales in columns": (_fp8_columns, _our_fp8),
    "FP8 tokens, CUDA": (_fp8_tokens, activation.quantize_fp8_tokens),
    "FP8 static, Triton": (_fp8_static, _our_static),
}


def exact_scales(name: str, x: torch.Tensor) -> torch.Tensor:
    """One a number, float64."""
    values = x.double()
    if "static" in name:
        return torch.full_like(values, float(torch.tensor(0.0123)))
    greatest = 127 if "INT8" in name else 448
    size = values.shape[1] if "tokens" in name else 128
    groups = values.view(len(values), -1, size).abs().amax(2)
    return (groups.clamp(min=1e-10) / greatest).repeat_interleave(size, 1)


def as_codes(name: str, quotients: torch.Tensor) -> torch.Tensor:
    """Magnitudes that quotients without a sign are stored as, float64."""
    if name.startswith("INT8 tokens"):
        return (quotients + 0.5).floor()
    if "INT8" in name:
        return quotients.clamp(max=128).trunc()
    return quotients.clamp(max=448).float().to(torch.float8_e4m3fn).double()


def steps(codes: torch.Tensor) -> torch.Tensor:
    """Codes counted from zero; FP8's are a sign and a count."""
    if codes.dtype == torch.int8:
        return codes.int()
    bits = codes.view(torch.uint8).int()
    return (bits & 127) * torch.where(bits > 127, -1, 1)


@pytest.mark.parametrize("num_tokens", [33, 1024])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_codes_are_the_kernels_but_for_quotients_on_a_boundary(
    gpu: int, report: list[str], name: str, width: int, num_tokens: int
) -> None:
    theirs, ours = QUANTIZERS[name]
    x = spread(num_tokens, width)
    codes, scales = (tensor.cpu() for tensor in theirs(x.to(DEVICE)))
    our_codes, our_scales = ours(x)
    if "tokens" in name:
        # of a token of zeros the kernel stores the greatest code, and a scale of zero
        codes.view(torch.uint8)[scales.flatten() == 0] = 0
    distance = (steps(our_codes) - steps(codes)).abs()
    size = our_scales.abs().clamp(min=torch.finfo(torch.float32).tiny)
    off = float(((scales - our_scales).abs() / size).max())
    quotients = x.double().abs() / exact_scales(name, x)
    magnitudes = codes.double().abs()
    is_explained = (magnitudes >= as_codes(name, quotients * (1 - _SLACK))) & (
        magnitudes <= as_codes(name, quotients * (1 + _SLACK))
    )
    wrong = int((~is_explained).sum())
    text = (
        f"{float((distance > 0).float().mean()):.6f} of the codes differ, by {int(distance.max())} "
        f"at most, scales by {off:.2e}; {wrong} codes are not of the exact quotients"
    )
    report.append(f"{name}, {num_tokens} x {width}: {text}")
    assert not wrong, text
    assert int(distance.max()) <= 1, text
    assert off <= _SLACK, text


def _random_codes(num_rows: int, num_columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    factor = 1 if dtype == torch.float8_e4m3fn else 40
    return torch.randn(num_rows, num_columns, generator=generator).mul_(factor).to(dtype)


def _random_scales(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.rand(*shape, generator=generator).add_(0.01)


def _block_case(num_tokens: int, N: int, K: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Codes, weight, scales of the codes, scales of the weight."""
    left, right = _random_codes(num_tokens, K, dtype, 0), _random_codes(N, K, dtype, 1)
    return left, right, _random_scales(num_tokens, K // 128), _random_scales(-(-N // 128), K // 128)


def _shares(out: torch.Tensor, ours: torch.Tensor, off: Off) -> str:
    share = float((out.cpu() != ours).float().mean())
    return f"{share:.6f} of the outputs differ, off by {off}"


@pytest.mark.parametrize(("num_tokens", "N", "K"), SHAPES)
def test_int8_block_matmul_is_the_kernels(
    gpu: int, report: list[str], num_tokens: int, N: int, K: int
) -> None:
    from sglang.kernels.ops.gemm.int8_kernel import w8a8_block_int8_matmul

    case = _block_case(num_tokens, N, K, torch.int8)
    left, right, scales, grid = case
    ours = block_matmul(left, scales, right, grid, BLOCK, torch.bfloat16)
    on_gpu = [tensor.to(DEVICE) for tensor in case]
    out = w8a8_block_int8_matmul(*on_gpu, list(BLOCK), torch.bfloat16)
    # products of int8 are exact; a multiply and add in one rounding turns few of the last
    off = compare(out, ours.double(), 2**-8)
    text = _shares(out, ours, off)
    report.append(f"INT8 block matmul, {num_tokens} x {N} x {K}: {text}")
    assert float((out.cpu() != ours).float().mean()) <= 0.002, text
    assert off.is_within, text


@pytest.mark.parametrize(("num_tokens", "N", "K"), SHAPES)
def test_fp8_block_matmul_is_the_kernels(
    gpu: int, report: list[str], num_tokens: int, N: int, K: int
) -> None:
    from sglang.kernels.ops.gemm.fp8_kernel import w8a8_block_fp8_matmul_triton

    case = _block_case(num_tokens, N, K, torch.float8_e4m3fn)
    left, right, scales, grid = case
    ours = block_matmul(left, scales, right, grid, BLOCK, torch.bfloat16)
    on_gpu = [tensor.to(DEVICE) for tensor in case]
    out = w8a8_block_fp8_matmul_triton(*on_gpu, list(BLOCK), torch.bfloat16)
    # both round the result, and a block of 128 is added up in fewer bits
    off = compare(out, ours.double(), 2**0.5 * ROUNDING + 128 * _FP8_SUM)
    text = _shares(out, ours, off)
    report.append(f"FP8 block matmul, {num_tokens} x {N} x {K}: {text}")
    assert off.is_within, text


def _cutlass(*arguments: Any) -> torch.Tensor:
    from sglang.kernels.ops.gemm import fp8_scaled_mm

    found: torch.Tensor = fp8_scaled_mm(*arguments)
    return found


def _triton(*arguments: Any) -> torch.Tensor:
    from sglang.kernels.ops.gemm.fp8_kernel import triton_scaled_mm

    found: torch.Tensor = triton_scaled_mm(*arguments)
    return found


@pytest.mark.parametrize("kernel", [_cutlass, _triton], ids=["CUTLASS", "Triton"])
@pytest.mark.parametrize(("num_tokens", "N", "K"), SHAPES)
def test_fp8_channel_matmul_is_the_kernels(
    gpu: int,
    report: list[str],
    kernel: Callable[..., torch.Tensor],
    num_tokens: int,
    N: int,
    K: int,
) -> None:
    left = _random_codes(num_tokens, K, torch.float8_e4m3fn, 0)
    right = _random_codes(N, K, torch.float8_e4m3fn, 1)
    scales, channels = _random_scales(num_tokens, 1), _random_scales(N, 1)
    ours = channel_matmul(left, scales, right, channels, torch.bfloat16)
    on_gpu = [tensor.to(DEVICE) for tensor in (left, right, scales, channels)]
    out = kernel(on_gpu[0], on_gpu[1].t(), on_gpu[2], on_gpu[3], torch.bfloat16)
    # both round the result, and all of K is added up in fewer bits
    off = compare(out, ours.double(), 2**0.5 * ROUNDING + K * _FP8_SUM)
    text = _shares(out, ours, off)
    report.append(f"FP8 channel matmul, {kernel.__name__}, {num_tokens} x {N} x {K}: {text}")
    assert off.is_within, text


@pytest.mark.parametrize(("num_tokens", "N", "K"), SHAPES)
def test_int8_channel_matmul_is_the_kernels(
    gpu: int, report: list[str], num_tokens: int, N: int, K: int
) -> None:
    from sgl_kernel import int8_scaled_mm

    if gpu > 90:
        pytest.skip("int8_scaled_mm has no code for this GPU")
    left, right = _random_codes(num_tokens, K, torch.int8, 0), _random_codes(N, K, torch.int8, 1)
    scales, channels = _random_scales(num_tokens, 1), _random_scales(N, 1)
    ours = channel_matmul(left, scales, right, channels, torch.bfloat16)
    on_gpu = [tensor.to(DEVICE) for tensor in (left, right, scales, channels)]
    out = int8_scaled_mm(on_gpu[0], on_gpu[1].t(), on_gpu[2], on_gpu[3], torch.bfloat16)
    # the sums are exact: what differs is in which order the two scales are multiplied
    off = compare(out, ours.double(), 2**0.5 * ROUNDING)
    text = _shares(out, ours, off)
    report.append(f"INT8 channel matmul, {num_tokens} x {N} x {K}: {text}")
    assert off.is_within, text


def _awq_triton(qweight: torch.Tensor, scales: torch.Tensor, qzeros: torch.Tensor) -> torch.Tensor:
    from sglang.kernels.ops.quantization.awq_triton import awq_dequantize_triton

    found: torch.Tensor = awq_dequantize_triton(qweight, scales, qzeros)
    return found


def _awq_cuda(qweight: torch.Tensor, scales: torch.Tensor, qzeros: torch.Tensor) -> torch.Tensor:
    from sglang.kernels.ops.quantization.awq_dequantize import awq_dequantize

    found: torch.Tensor = awq_dequantize(qweight, scales, qzeros)
    return found


@pytest.mark.parametrize("kernel", [_awq_cuda, _awq_triton], ids=["CUDA", "Triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("N", "K", "group_size"), [(576, 576, 64), (640, 768, 128), (1536, 768, 32)]
)
def test_awq_weights_are_the_kernels_bit_for_bit(
    gpu: int,
    report: list[str],
    kernel: Callable[..., torch.Tensor],
    dtype: torch.dtype,
    N: int,
    K: int,
    group_size: int,
) -> None:
    generator = torch.Generator().manual_seed(0)
    limits = torch.iinfo(torch.int32)
    num_groups = K // group_size
    words = {"generator": generator, "dtype": torch.int32}
    qweight = torch.randint(limits.min, limits.max, (K, N // 8), **words)  # type: ignore[call-overload]
    qzeros = torch.randint(limits.min, limits.max, (num_groups, N // 8), **words)  # type: ignore[call-overload]
    scales = torch.rand(num_groups, N, generator=generator).to(dtype)
    out = kernel(qweight.to(DEVICE), scales.to(DEVICE), qzeros.to(DEVICE)).cpu()
    ours = dequantize(unpack_awq(qweight), unpack_awq(qzeros), scales).t()
    text = f"{int((out != ours).sum())} of {ours.numel()} weights differ"
    report.append(f"AWQ weights, {kernel.__name__}, {dtype}, {N} x {K}: {text}")
    assert torch.equal(out, ours), text
