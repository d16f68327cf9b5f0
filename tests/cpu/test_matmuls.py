"""The matmuls against their definitions, evaluated in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixedprec_plugin.cpu import packed, scaled_matmul
from mixedprec_plugin.cpu.packed import Int4Weight, Int8Weight, dequantize, multiply
from mixedprec_plugin.cpu.scaled_matmul import block_matmul, channel_matmul, exact_in_bfloat16
from mixedprec_plugin.cpu.widen import widen_int4

SIZES = st.sampled_from([1, 2, 63, 64, 65, 128, 192, 257, 300, 576])
TOKENS = st.sampled_from([1, 3, 16, 17, 64, 65, 257])
SEEDS = st.integers(0, 2**31)


def _codes(shape: tuple[int, int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.mul_(40).clamp_(-120, 120).to(dtype)


def _positive(shape: tuple[int, int], seed: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.01


def _assert_near(out: torch.Tensor, exact: torch.Tensor, sums: torch.Tensor, K: int) -> None:
    """One rounding to bfloat16, and float32 sums of K terms of those magnitudes."""
    bound = exact.abs() * 2**-8 + sums * (K + 4) * 2**-24
    assert ((out.double() - exact).abs() <= bound).all()


@settings(deadline=None)
@given(TOKENS, SIZES, st.sampled_from([128, 384, 768]), SEEDS, st.sampled_from(["fp8", "int8"]))
def test_block_matmul_is_its_definition(num_tokens, N, K, seed, name):
    dtype = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}[name]
    left, right = _codes((num_tokens, K), dtype, seed), _codes((N, K), dtype, seed + 1)
    scales, grid = (
        _positive((num_tokens, K // 128), seed),
        _positive((-(-N // 128), K // 128), seed),
    )
    out = block_matmul(left, scales, right, grid, (128, 128), torch.bfloat16)
    x = left.double() * scales.double().repeat_interleave(128, 1)
    rows, columns = torch.arange(N) // 128, torch.arange(K) // 128
    weight = right.double() * grid.double()[rows][:, columns]
    _assert_near(out, x @ weight.t(), x.abs() @ weight.abs().t(), K)


@pytest.mark.parametrize("block_size", [(64, 64), (128, 64), (64, 128)])
def test_block_matmul_takes_other_blocks(block_size):
    left, right = _codes((5, 256), torch.int8, 0), _codes((200, 256), torch.int8, 1)
    block_n, block_k = block_size
    scales, grid = (
        _positive((5, 256 // block_k), 2),
        _positive((-(-200 // block_n), 256 // block_k), 3),
    )
    out = block_matmul(left, scales, right, grid, block_size, torch.float32)
    weight = (
        right.double()
        * grid.double()[torch.arange(200) // block_n][:, torch.arange(256) // block_k]
    )
    exact = (left.double() * scales.double().repeat_interleave(block_k, 1)) @ weight.t()
    assert torch.allclose(out.double(), exact, rtol=1e-5, atol=1e-3)


def test_int8_products_are_the_same_with_and_without_vnni(monkeypatch):
    left, right = _codes((9, 768), torch.int8, 0), _codes((300, 768), torch.int8, 1)
    scales, grid = _positive((9, 6), 2), _positive((3, 6), 3)
    results = []
    for supported in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda answer=supported: answer)
        results.append(block_matmul(left, scales, right, grid, (128, 128), torch.bfloat16))
    assert torch.equal(*results)


def test_batched_and_looped_fp8_sums_agree(monkeypatch):
    left, right = (
        _codes((33, 768), torch.float8_e4m3fn, 0),
        _codes((300, 768), torch.float8_e4m3fn, 1),
    )
    scales, grid = _positive((33, 6), 2), _positive((3, 6), 3)
    results = []
    for limit in (64, 0):
        monkeypatch.setattr(scaled_matmul, "_FEW_TOKENS_OF_BLOCKS", limit)
        results.append(block_matmul(left, scales, right, grid, (128, 128), torch.float32))
    assert torch.allclose(*results, rtol=1e-4, atol=1e-2)


@settings(deadline=None)
@given(
    TOKENS, SIZES, st.sampled_from([64, 768, 2304]), SEEDS, st.booleans(),
    st.sampled_from([torch.float8_e4m3fn, torch.int8]),
)  # fmt: skip
def test_channel_matmul_is_its_definition(num_tokens, N, K, seed, is_static, dtype):
    left, right = _codes((num_tokens, K), dtype, seed), _codes((N, K), dtype, seed + 1)
    scales = _positive((1, 1) if is_static else (num_tokens, 1), seed)
    channels = _positive((N, 1), seed + 2)
    out = channel_matmul(left, scales, right, channels, torch.bfloat16)
    x, weight = left.double() * scales.double(), right.double() * channels.double()
    _assert_near(out, x @ weight.t(), x.abs() @ weight.abs().t(), K)


def test_int8_channels_are_exact_integers_scaled_once(monkeypatch):
    """(channel scale * token scale) * sum of integers, with and without VNNI."""
    left, right = _codes((9, 2304), torch.int8, 0), _codes((300, 2304), torch.int8, 1)
    scales, channels = _positive((9, 1), 2), _positive((300, 1), 3)
    sums = (left.long() @ right.long().t()).float()
    expected = (sums * (scales * channels.t())).bfloat16()
    for supported in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda answer=supported: answer)
        assert torch.equal(channel_matmul(left, scales, right, channels, torch.bfloat16), expected)


def _int4(N: int, K: int, group_size: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Codes [N, K], zeros [N, K/G], scales [K/G, N]."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (N, K), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 16, (N, K // group_size), generator=generator, dtype=torch.uint8)
    return codes, zeros, _positive((K // group_size, N), seed).bfloat16()


def test_dequantize_rounds_once():
    codes, zeros, scales = _int4(64, 128, 32, 0)
    steps = codes.double() - zeros.double().repeat_interleave(32, 1)
    exact = steps * scales.double().t().repeat_interleave(32, 1)
    assert torch.equal(dequantize(codes, zeros, scales), exact.bfloat16())


@settings(deadline=None)
@given(
    st.integers(1, 70),
    st.sampled_from([64, 192, 640]),
    st.sampled_from([32, 64, 128, 768]),
    SEEDS,
    st.booleans(),
)
def test_packed_int4_is_the_plain_product_within_its_roundings(T, N, group_size, seed, has_zeros):
    K = 768
    codes, zeros, scales = _int4(N, K, group_size, seed)
    points = zeros if has_zeros else 8
    weight = Int4Weight.pack(codes.__getitem__, N, K, scales, points)
    if packed.block_rows() is None:  # then layers keep the checkpoint's layout, see below
        assert weight is None
        return
    assert weight is not None
    x = torch.randn(T, K, generator=torch.Generator().manual_seed(seed)).bfloat16()
    plain = multiply(x, dequantize(codes, points, scales)).double()
    # The kernel's offset (8 - z) * s and the plain weight (q - z) * s are each rounded to bfloat16,
    # by 2**-9 of them at most; both results are rounded once.
    steps = codes.double() - (zeros.double().repeat_interleave(group_size, 1) if has_zeros else 8)
    columns = scales.double().t().repeat_interleave(group_size, 1)
    roundings = (steps.abs() + (8 if has_zeros else 0)) * columns * 2**-9
    bound = x.double().abs() @ (roundings + columns * 16 * (K + 4) * 2**-24).t()
    assert ((weight.multiply(x).double() - plain).abs() <= bound + plain.abs() * 2**-7).all()


def _pack_by_definition(codes: torch.Tensor, rows: int) -> torch.Tensor:
    """Blocks of rows; K runs over a block's columns; row r in the low nibble, r + half above."""
    half, packed = rows // 2, []
    for start in range(0, len(codes), rows):
        for column in range(codes.shape[1]):
            low = codes[start : start + half, column]
            high = codes[start + half : start + rows, column]
            packed.append(low + 16 * high)
    return torch.cat(packed).view(len(codes), -1)


@pytest.mark.parametrize("rows", [32, 64])
def test_both_int4_layouts_can_be_undone(rows):
    codes = _int4(128, 96, 32, 0)[0]
    assert torch.equal(packed._unpack_blocks(_pack_by_definition(codes, rows), rows), codes)


@pytest.mark.parametrize("rows", [32, 64])
@pytest.mark.parametrize("has_zeros", [False, True])
def test_widening_rounds_once_in_both_layouts(rows, has_zeros):
    codes, zeros, scales = _int4(192, 96, 32, 0)
    scales[0, :8] = torch.tensor([1e-40, 1e-38, 3e38, -0.5, 0.0, 1.0, 2.0**-126, -1e-39])
    points = zeros if has_zeros else torch.full_like(zeros, 8)
    steps = codes.double() - points.double().repeat_interleave(32, 1)
    exact = steps * scales.double().t().repeat_interleave(32, 1)
    made = torch.empty(96, 192, dtype=torch.bfloat16)
    got = widen_int4(
        _pack_by_definition(codes, rows), zeros if has_zeros else 8, scales, rows, made
    )
    assert torch.equal(got, exact.bfloat16())


def test_packing_some_rows_at_a_time_gives_the_layout_of_the_whole():
    codes = _int4(1536, 768, 128, 0)[0]
    whole = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    assert torch.equal(packed.pack_int4(codes), whole)


@pytest.mark.parametrize(
    ("N", "group_size", "dtype"),
    [(72, 128, torch.bfloat16), (64, 24, torch.bfloat16), (64, 128, torch.float16)],
)
def test_int4_refuses_what_the_kernel_does_not_take(N, group_size, dtype):
    codes, zeros, scales = _int4(N, 768, group_size, 0)
    assert Int4Weight.pack(codes.__getitem__, N, 768, scales.to(dtype), zeros) is None


@pytest.mark.parametrize("num_groups", [1, 12])
@pytest.mark.parametrize("num_tokens", [1, 16, 17])
def test_packed_int8_is_the_plain_product_within_its_roundings(num_tokens, num_groups):
    codes = torch.randint(0, 256, (300, 768), dtype=torch.uint8)
    scales = _positive((num_groups, 300), 0).bfloat16()
    weight = Int8Weight.pack(codes, scales)
    assert torch.equal(weight.unpack(), codes)
    x = torch.randn(num_tokens, 768).bfloat16()
    plain = multiply(x, dequantize(codes, 128, scales)).double()
    columns = scales.double().t().repeat_interleave(768 // num_groups, 1)
    bound = x.double().abs() @ (columns * (codes.double() - 128).abs() * 2**-8.9).t()
    assert ((weight.multiply(x).double() - plain).abs() <= bound + plain.abs() * 2**-7).all()


def test_switch_to_bfloat16_is_put_back():
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    with exact_in_bfloat16(enabled=True):
        assert matmul.fp32_precision == "bf16"
    assert matmul.fp32_precision == before


def test_codes_multiply_exactly_in_bfloat16():
    left, right = (_codes((65, 128), torch.int8, seed).float() for seed in (0, 1))
    with exact_in_bfloat16(enabled=True):
        product = left @ right.t()
    assert torch.equal(product.double(), left.double() @ right.double().t())
