"""Weight -> tensors -> weight: error bounds that follow from the grids, for any weight.

Half a step is the bound for rounding to nearest. What is added to it is derived, not measured: with
u the unit roundoff of the scale's dtype, a scale that was rounded down by u leaves the ends of the
range (codes c from zero) up to c * u / (1 - u) steps outside; 2**-14 covers the float32 roundings
of quotient and product (each at most 2**-24 relative, of at most 256 steps).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as stnp

from tests.quantize.arrays import as_arrays
from tests.quantize.methods import CASES, Case, case
from tests.reference import dequantize as reference

SLACK = 2.0**-14
LARGEST = 2.0**15
SCALE_DTYPES = (torch.bfloat16, torch.float16)
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
methods = pytest.mark.parametrize("method", CASES, ids=str)


@st.composite
def weights(draw: st.DrawFn, num_columns: int = 64) -> torch.Tensor:
    """[8 or 16, 64], adversarial or bell-shaped, of any scale, any weight dtype."""
    shape = (draw(st.sampled_from([8, 16])), num_columns)
    if draw(st.booleans()):
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        values = torch.randn(shape, generator=generator) * 2.0 ** draw(st.integers(-30, 10))
        values += draw(st.sampled_from([0.0, 3.0, -3.0])) * values.abs().amax()
    else:
        elements = st.floats(-LARGEST, LARGEST, width=32)
        values = torch.from_numpy(draw(stnp.arrays(np.float32, shape, elements=elements)))
    return values.to(draw(st.sampled_from(WEIGHT_DTYPES)))


def spread_groups(per_group: torch.Tensor, num_columns: int) -> torch.Tensor:
    """[K/G, N] -> [N, K], as float64."""
    columns = per_group.t().double()
    return columns.repeat_interleave(num_columns // columns.shape[1], dim=1)


def assert_within(weight: torch.Tensor, again: torch.Tensor, bound: torch.Tensor) -> None:
    error = (weight.double() - again.double()).abs()
    excess = error - bound
    worst = int(excess.argmax())
    assert excess.flatten()[worst] <= 0, (
        f"{weight.flatten()[worst]} came back as {again.flatten()[worst]}, "
        f"{error.flatten()[worst]} away (bound {bound.expand_as(error).flatten()[worst]})"
    )


@given(weights(), st.sampled_from([None, [128, 128], [8, 32]]))
def test_fp8_error_is_at_most_half_a_step(weight: torch.Tensor, block: list[int] | None) -> None:
    fp8 = Case("fp8", {"weight_block_size": block, "activation_scheme": "dynamic"})
    tensors = fp8.quantize(weight)
    if block is None:
        scale = tensors["weight_scale"].double().expand_as(weight)
    else:
        rows = torch.arange(weight.shape[0])[:, None] // block[0]
        columns = torch.arange(weight.shape[1])[None, :] // block[1]
        scale = tensors["weight_scale_inv"].double()[rows, columns]
    # Three mantissa bits: half a step is 2**-4 of the binade's lower end, and 2**-10 scales below
    # the smallest normal number, 2**-6.
    half_step = torch.maximum(weight.double().abs() * 2.0**-4, scale * 2.0**-10)
    assert_within(weight, fp8.dequantize(tensors), half_step * (1 + SLACK))


@given(weights())
def test_int8_error_is_at_most_half_a_step(weight: torch.Tensor) -> None:
    int8 = Case("blockwise_int8", {"weight_block_size": [8, 32]})
    tensors = int8.quantize(weight)
    rows = torch.arange(weight.shape[0])[:, None] // 8
    columns = torch.arange(weight.shape[1])[None, :] // 32
    scale = tensors["weight_scale_inv"].double()[rows, columns]
    assert_within(weight, int8.dequantize(tensors), scale * (0.5 + SLACK))
    assert int(tensors["weight"].min()) >= -127


@given(weights(), st.sampled_from([32, 64, -1]), st.sampled_from(SCALE_DTYPES))
def test_awq_error_is_at_most_half_a_step(
    weight: torch.Tensor, group_size: int, dtype: torch.dtype
) -> None:
    awq = case("awq", group_size=group_size)
    tensors = awq.quantize(weight, dtype)
    u = torch.finfo(dtype).eps / 2
    step = spread_groups(tensors["scales"], weight.shape[1])
    bound = step * (0.5 + 15 * u / (1 - u) + SLACK)
    assert_within(weight, awq.dequantize(tensors), bound)


@given(
    weights(),
    st.sampled_from([4, 8]),
    st.sampled_from([32, 64, -1]),
    st.sampled_from(SCALE_DTYPES),
)
def test_gptq_error_is_at_most_half_a_step(
    weight: torch.Tensor, bits: int, group_size: int, dtype: torch.dtype
) -> None:
    gptq = case("gptq", bits=bits, group_size=group_size)
    tensors = gptq.quantize(weight, dtype)
    u = torch.finfo(dtype).eps / 2
    step = spread_groups(tensors["scales"], weight.shape[1]).abs()
    ends = 2 ** (bits - 1) + 0.5
    bound = step * (0.5 + ends * u / (1 - u) + SLACK)
    assert_within(weight, gptq.dequantize(tensors), bound)


@given(weights(), st.sampled_from(SCALE_DTYPES))
def test_gptq_steps_are_never_coarser_than_the_usual_ones(
    weight: torch.Tensor, dtype: torch.dtype
) -> None:
    tensors = case("gptq", bits=4, group_size=32).quantize(weight, dtype)
    largest = weight.double().abs().view(len(weight), 2, 32).amax(-1).t()
    u = torch.finfo(dtype).eps / 2
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    usual = largest / 7.5 * (1 + u + SLACK) + max(smallest, torch.finfo(torch.float32).tiny)
    assert bool((tensors["scales"].double().abs() <= usual).all())


@methods
@settings(max_examples=30)
@given(weight=weights())
def test_dequantize_equals_the_reference(method: Case, weight: torch.Tensor) -> None:
    # nvfp4 refuses what is all small
    assume(method.method != "nvfp4" or not 2.0**-24 <= float(weight.abs().max()) < 1e-4)
    tensors = method.quantize(weight)
    expected = reference.dequantize_method(method.method, as_arrays(tensors), method.arguments)
    np.testing.assert_array_equal(method.dequantize(tensors).numpy(), expected, strict=True)


def grid_weight(codes: np.ndarray, zero: int, scale: float, low: int, high: int) -> torch.Tensor:
    """Codes times scale, with both ends of the grid in every group of 32."""
    grouped = codes.reshape(-1, 32).copy()
    grouped[:, 0], grouped[:, 1] = low, high
    return torch.from_numpy((grouped.reshape(codes.shape) - zero) * np.float32(scale)).float()


scales_of_bf16 = st.tuples(st.integers(128, 255), st.integers(-40, 0)).map(
    lambda pair: float(pair[0] * 2.0 ** pair[1])
)


def codes_below(largest: int) -> st.SearchStrategy[np.ndarray]:
    return stnp.arrays(np.int32, (8, 64), elements=st.integers(0, largest))


@given(codes_below(15), st.integers(0, 15), scales_of_bf16)
def test_awq_returns_a_weight_on_its_grid_unchanged(
    codes: np.ndarray, zero: int, scale: float
) -> None:
    weight = grid_weight(codes, zero, scale, low=0, high=15)
    awq = case("awq", group_size=32)
    assert torch.equal(awq.dequantize(awq.quantize(weight, torch.bfloat16)), weight)


@given(codes_below(254), st.integers(-60, 20))
def test_int8_returns_a_weight_on_its_grid_unchanged(codes: np.ndarray, exponent: int) -> None:
    weight = grid_weight(codes, 127, 2.0**exponent, low=0, high=254)
    int8 = case("blockwise_int8")
    assert torch.equal(int8.dequantize(int8.quantize(weight)), weight)


@pytest.mark.parametrize("block", [None, [128, 128]])
@given(
    codes=stnp.arrays(np.uint8, (8, 64), elements=st.integers(0, 0x7E)),
    exponent=st.integers(-60, 20),
)
def test_fp8_returns_a_weight_on_its_grid_unchanged(
    block: list[int] | None, codes: np.ndarray, exponent: int
) -> None:
    codes = codes.copy()
    codes[0, 0], codes[:, 1::2] = 0x7E, codes[:, 1::2] | 0x80
    weight = torch.from_numpy(codes).view(torch.float8_e4m3fn).float() * 2.0**exponent
    fp8 = case("fp8", weight_block_size=block)
    tensors = fp8.quantize(weight)
    assert torch.equal(tensors["weight"].view(torch.uint8), torch.from_numpy(codes))
    assert torch.equal(fp8.dequantize(tensors), weight)


def test_fp8_dequantize_reads_all_256_codes() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128)
    for keep in (codes, codes.clamp(max=254) & 0x7E):
        tensors = {"weight": keep.view(torch.float8_e4m3fn), "weight_scale": torch.tensor(1.0)}
        expected = as_arrays(tensors)["weight"]
        again = case("fp8").dequantize(tensors).numpy()
        np.testing.assert_array_equal(again, expected)
        np.testing.assert_array_equal(np.signbit(again), np.signbit(expected))
