"""Rounding with feedback, against brute force, plain rounding and its own loss, on both paths."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixedprec_plugin.errors import ShapeError
from mixedprec_plugin.quantize import feedback, fp4
from mixedprec_plugin.quantize.feedback import Rounded, round_with_feedback
from mixedprec_plugin.quantize.fp4 import Fp4, Fp4Tiles, packed_tiles
from mixedprec_plugin.quantize.rounding import Grid, Tiles, round_groups
from mixedprec_plugin.quantize.scaled import Scaled, quantize_tiles

AWQ = Grid(bits=4, symmetric=False, scale_dtype=torch.bfloat16)
GPTQ = Grid(bits=4, symmetric=True, scale_dtype=torch.bfloat16)
GPTQ_8 = Grid(bits=8, symmetric=True, scale_dtype=torch.bfloat16)
INT8 = Tiles(torch.int8, rows=16, columns=None)
FP8 = Tiles(torch.float8_e4m3fn, rows=1, columns=None)
FP4 = Fp4Tiles(torch.float8_e4m3fn, rows=1, columns=16)
GRIDS = pytest.mark.parametrize(
    "grid",
    [AWQ, GPTQ, GPTQ_8, INT8, FP8, FP4],
    ids=["awq", "gptq", "gptq8", "int8", "fp8", "fp4"],
)


def correlated(K: int, seed: int = 0) -> torch.Tensor:
    """H of inputs that are mixtures of a few, some channels far larger than others: [K, K]."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4 * K, K // 4, generator=generator)
    inputs = inputs @ torch.randn(K // 4, K, generator=generator)
    inputs = inputs + 0.3 * torch.randn(4 * K, K, generator=generator)
    inputs *= torch.logspace(0, -1.5, K)[torch.randperm(K, generator=generator)]
    return inputs.t() @ inputs / len(inputs)


def weight_of(N: int, K: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) * 0.05


def dequantize(rounded: Rounded, group_size: int) -> torch.Tensor:
    scales, zeros = (
        one.repeat_interleave(group_size, 1)[:, : rounded.codes.shape[1]]
        for one in (rounded.scales, rounded.zeros)
    )
    return (rounded.codes.float() - zeros) * scales


def loss(weight: torch.Tensor, other: torch.Tensor, H: torch.Tensor) -> float:
    error = (other - weight).double()
    return float(((error @ H.double()) * error).sum())


def nearest(weight: torch.Tensor, group_size: int, grid: Grid | Tiles) -> torch.Tensor:
    if isinstance(grid, Fp4Tiles):
        return Fp4(*fp4.quantize_blocks(weight, group_size)).dequantize()
    if isinstance(grid, Tiles):
        block = (grid.rows or len(weight), group_size)
        return Scaled(*quantize_tiles(weight, block, grid.dtype), block).dequantize()
    codes, scales, zeros = round_groups(weight.clone(), group_size, grid)
    return dequantize(Rounded(codes, scales, zeros.short(), weight, torch.zeros(0)), group_size)


@GRIDS
@pytest.mark.parametrize("group_size", [32, 128])
def test_halves_the_loss_of_rounding_to_nearest(grid: Grid | Tiles, group_size: int) -> None:
    weight, H = weight_of(40, 256), correlated(256)
    made = round_with_feedback(weight, H, group_size, grid)
    plain = loss(weight, nearest(weight, group_size, grid), H)
    assert loss(weight, dequantize(made, group_size), H) < 0.5 * plain


@GRIDS
def test_tells_its_own_loss(grid: Grid | Tiles) -> None:
    weight, H = weight_of(24, 128), correlated(128)
    made = round_with_feedback(weight, H, 64, grid)
    assert float(made.losses.sum()) == pytest.approx(
        loss(weight, dequantize(made, 64), H), rel=1e-3
    )


def test_is_as_good_as_the_best_codes_of_all() -> None:
    """Brute force over every code, at the scale and zero that were chosen."""
    group, grid = 4, Grid(bits=2, symmetric=False, scale_dtype=torch.float32)
    every = torch.tensor(list(itertools.product(range(4), repeat=group))).float()
    best, found = 0.0, 0.0
    for seed in range(20):
        weight, H = weight_of(1, group, seed), correlated(16, seed)[:group, :group]
        made = round_with_feedback(weight, H, group, grid)
        values = (every - made.zeros[0]) * made.scales[0]
        best += min(loss(weight, row[None], H) for row in values)
        found += loss(weight, dequantize(made, group), H)
    assert found <= 1.25 * best


@GRIDS
def test_descent_never_raises_the_loss(grid: Grid | Tiles) -> None:
    weight, H = weight_of(16, 128), correlated(128)
    losses = [float(round_with_feedback(weight, H, 32, grid, n).losses.sum()) for n in range(5)]
    # 0.2% of the mean of the diagonal is added to what is made less
    assert all(b <= a * (1 + 1e-3) for a, b in itertools.pairwise(losses))
    assert losses[3] < losses[0]


@pytest.mark.parametrize("grid", [INT8, FP8], ids=["int8", "fp8"])
def test_a_tile_has_one_scale_and_codes_of_its_dtype(grid: Tiles) -> None:
    """With tiles that are cut off at both ends, and wider than what is fed back one by one."""
    N, K, columns = 40, 200, 136
    weight, H = weight_of(N, K), correlated(K)
    made = round_with_feedback(weight, H, columns, grid)
    assert made.codes.dtype == grid.dtype
    assert made.scales.shape == (N, 2)
    rows = grid.rows or N
    for first in range(0, N, rows):
        assert bool((made.scales[first : first + rows] == made.scales[first]).all())
    assert float(made.losses.sum()) == pytest.approx(
        loss(weight, dequantize(made, columns), H), rel=1e-3
    )
    plain = loss(weight, nearest(weight, columns, grid), H)
    assert float(made.losses.sum()) < 0.6 * plain


def test_fp4_is_packed_as_it_was_rounded() -> None:
    weight, H = weight_of(20, 96), correlated(96)
    made = round_with_feedback(weight, H, 16, FP4)
    numbers = packed_tiles(Scaled(made.codes, made.scales, (1, 16)))
    assert torch.equal(numbers.dequantize(), dequantize(made, 16))
    assert loss(weight, numbers.dequantize(), H) < 0.6 * loss(weight, nearest(weight, 16, FP4), H)
    with pytest.raises(ShapeError, match=r"values as large as 22 are not calibrated \(expected 21"):
        round_with_feedback(torch.full((4, 96), 22.0), H, 16, FP4)


@given(st.integers(-20, 4), st.sampled_from([1, -1]), st.integers(0, 1000))
@settings(max_examples=30)
def test_a_weight_on_the_symmetric_grid_comes_back_unchanged(
    exponent: int, sign: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (8, 64), generator=generator)
    codes[:, 0::32], codes[:, 1::32] = 0, 15
    weight = (codes - 8) * (sign * 1.25 * 2.0**exponent)
    made = round_with_feedback(weight, correlated(64, seed), 32, GPTQ)
    assert torch.equal(dequantize(made, 32), weight)


def test_what_the_inputs_never_show_may_be_anything_but_is_finite() -> None:
    weight, H = weight_of(8, 64), torch.zeros(64, 64)
    H[:3, :3] = torch.eye(3)
    made = round_with_feedback(weight, H, 32, AWQ)
    assert bool(dequantize(made, 32).isfinite().all())
    assert loss(weight, dequantize(made, 32), H) < 0.5 * loss(weight, nearest(weight, 32, AWQ), H)


def test_refuses_statistics_that_are_no_numbers() -> None:
    for H in (torch.zeros(64, 64), torch.full((64, 64), float("nan"))):
        with pytest.raises(ValueError, match="the mean of H's diagonal"):
            round_with_feedback(weight_of(8, 64), H, 32, AWQ)


@GRIDS
@pytest.mark.parametrize("N", [5, 32, 70])
def test_compiled_loops_agree_with_torch(
    grid: Grid | Tiles, N: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, H = weight_of(N, 128), correlated(128)
    compiled = round_with_feedback(weight, H, 64, grid)
    monkeypatch.setattr(feedback, "_is_compiled", lambda _: False)
    plain = round_with_feedback(weight, H, 64, grid)
    # a tie that falls the other way changes what follows it; the loss stays what it is
    assert float((compiled.codes == plain.codes).float().mean()) > 0.98
    assert float(compiled.losses.sum()) == pytest.approx(float(plain.losses.sum()), rel=1e-2)
