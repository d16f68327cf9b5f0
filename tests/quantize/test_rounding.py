from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixedprec_plugin.quantize.rounding import Grid, store_scale
from tests.quantize.methods import CASES, Case


@given(st.floats(0, 60000, width=32))
def test_float16_scale_is_nearest_or_rounded_up_where_subnormal(magnitude: float) -> None:
    stored = float(store_scale(torch.tensor([magnitude]), torch.float16))
    assert stored == float(torch.tensor(stored).half())
    if magnitude >= 2.0**-14:
        assert stored == float(torch.tensor(magnitude).half())
    else:
        assert stored == max(math.ceil(magnitude * 2**24), 1) * 2.0**-24


def test_float16_scale_that_overflows_is_infinite() -> None:
    assert store_scale(torch.tensor([70000.0]), torch.float16).isinf().all()


def test_bfloat16_scale_is_never_zero() -> None:
    assert float(store_scale(torch.tensor([0.0]), torch.bfloat16)) == 2.0**-126


def test_symmetric_grid_turns_the_larger_side_down() -> None:
    grid = Grid(bits=4, symmetric=True, scale_dtype=torch.float32)
    low, high = torch.tensor([-1.0, -17.0, -17.0]), torch.tensor([17.0, 1.0, 16.0])
    scale, zero = grid.fit(low, high)
    # 17 / 8.5 = 2 with 1 far inside; 16 on the short side needs 16 / 7.5.
    torch.testing.assert_close(scale, torch.tensor([-2.0, 2.0, 16 / 7.5]))
    assert zero.tolist() == [8, 8, 8]


def test_asymmetric_grid_by_hand() -> None:
    grid = Grid(bits=4, symmetric=False, scale_dtype=torch.float32)
    scale, zero = grid.fit(torch.tensor([-1.0, 2.0, -3.0]), torch.tensor([2.0, 3.0, -1.5]))
    # (2 + 1) / 15; a group of one sign is measured from 0: 3 / 15 with zero 0, and with zero 15.
    torch.testing.assert_close(scale, torch.tensor([0.2, 0.2, 0.2]))
    assert zero.tolist() == [5, 0, 15]


@pytest.mark.parametrize("method", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_zero_weight_comes_back_as_zero(method: Case, dtype: torch.dtype) -> None:
    weight = torch.zeros(16, 64, dtype=dtype)
    tensors = method.quantize(weight, dtype)
    assert torch.equal(method.dequantize(tensors), weight.float())
    for suffix in tensors.keys() & {"scales", "weight_scale", "weight_scale_inv"}:
        scales = tensors[suffix].float()
        assert bool((scales != 0).all() and scales.isfinite().all())


@pytest.mark.parametrize("method", CASES, ids=str)
@pytest.mark.parametrize("value", [3.0, -3.0])
def test_constant_weight_comes_back_within_a_half_step(method: Case, value: float) -> None:
    again = method.dequantize(method.quantize(torch.full((16, 64), value)))
    # symmetric codes of 4 bits have 8 steps on a side, those of 3 have 4
    steps = 2 ** (min(method.arguments.get("bits", 4), 4) - 1)
    torch.testing.assert_close(again, torch.full((16, 64), value), rtol=0.5 / steps + 0.01, atol=0)


@pytest.mark.parametrize("method", CASES, ids=str)
def test_smallest_weights_come_back_finite(method: Case) -> None:
    weight = torch.full((16, 64), 2.0**-140)
    again = method.dequantize(method.quantize(weight, torch.float16))
    assert again.isfinite().all()
    assert again.abs().max() <= 2.0**-23
