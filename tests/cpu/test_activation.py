"""Quantized activations against the published formulas, evaluated in exact or double arithmetic."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixedprec_plugin.cpu.activation import (
    quantize_fp8_groups,
    quantize_fp8_static,
    quantize_fp8_tokens,
    quantize_int8_groups,
    quantize_int8_tokens,
)
from mixedprec_plugin.quantize.scaled import E4M3_UNIT, e4m3_halves

SEEDS = st.integers(0, 2**31)


def _random(seed: int, num_tokens: int, K: int, dtype: torch.dtype) -> torch.Tensor:
    """Tokens of very different magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-20, 12, (num_tokens, 1), generator=generator).float()
    return (torch.randn(num_tokens, K, generator=generator) * exponents.exp2()).to(dtype)


def test_every_e4m3_code_decodes_exactly():
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].view(torch.float8_e4m3fn)
    assert torch.equal(e4m3_halves(codes).float() * E4M3_UNIT, codes.float())


@given(seed=SEEDS, dtype=st.sampled_from([torch.bfloat16, torch.float16]))
def test_fp8_groups_round_to_within_half_a_step(seed, dtype):
    x = _random(seed, 4, 256, dtype)
    codes, scales = quantize_fp8_groups(x, 128)
    restored = codes.double().view(4, 2, 128) * scales.double().unsqueeze(2)
    wanted = x.double().view(4, 2, 128)
    # Half a step: 2**-4 of a normal number, 2**-10 of a unit below; 2**-20 for the scale's own
    # rounding, which may move a value across the middle between two codes.
    bound = (wanted.abs() * (2**-4 + 2**-20)).maximum(scales.double().unsqueeze(2) * 2**-9.99)
    assert ((restored - wanted).abs() <= bound).all()


@given(seed=SEEDS)
def test_int8_groups_truncate_towards_zero(seed):
    x = _random(seed, 4, 256, torch.bfloat16)
    codes, scales = quantize_int8_groups(x, 128)
    exact = x.double().view(4, 2, 128) / scales.double().unsqueeze(2)
    codes = codes.double().view(4, 2, 128)
    assert ((exact - codes).abs() < 1 + 1e-5).all()
    assert (codes.abs() <= exact.abs() + 1e-5).all()


@given(seed=SEEDS)
def test_fp8_tokens_fill_the_range(seed):
    codes, scales = quantize_fp8_tokens(_random(seed, 4, 256, torch.bfloat16))
    assert scales.shape == (4, 1)
    assert (codes.float().abs().amax(1) == 448).all()


@given(seed=SEEDS, dtype=st.sampled_from([torch.bfloat16, torch.float16]))
def test_int8_tokens_round_to_the_nearest_code(seed, dtype):
    x = _random(seed, 4, 256, dtype)
    codes, scales = quantize_int8_tokens(x)
    exact = x.double() * 127 / x.double().abs().amax(1, keepdim=True).clamp(min=1e-10)
    assert ((exact - codes.double()).abs() <= 0.5 + 1e-5).all()
    assert (codes.float().abs().amax(1) == 127).all()
    assert torch.allclose(scales.double(), x.double().abs().amax(1, keepdim=True) / 127)


def test_int8_tokens_round_halves_away_from_zero_as_roundf_does():
    """The largest is 127, so that the codes are the numbers; the float below a half is none."""
    x = torch.tensor([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.49999997, -0.49999997]])
    codes, scales = quantize_int8_tokens(x)
    assert codes.tolist() == [[127, 1, 2, 3, -1, -2, -3, 0, 0]]
    assert scales.tolist() == [[1.0]]


def test_zero_token_has_zero_codes_and_scale():
    codes, scales = quantize_fp8_tokens(torch.zeros(2, 16))
    assert scales.tolist() == [[0.0], [0.0]]
    assert codes.float().abs().sum() == 0


@pytest.mark.parametrize("quantize", [quantize_fp8_groups, quantize_int8_groups])
def test_zero_group_has_the_least_scale(quantize):
    codes, scales = quantize(torch.zeros(1, 256), 128)
    limit = 448 if quantize is quantize_fp8_groups else 127
    assert torch.allclose(scales, torch.full((1, 2), 1e-10 / limit), rtol=1e-6, atol=0)
    assert codes.float().abs().sum() == 0


def test_static_scale_saturates():
    codes = quantize_fp8_static(torch.tensor([[1000.0, -1000.0, 3.0]]), torch.tensor([2.0]))
    assert codes.float().tolist() == [[448.0, -448.0, 1.5]]


@pytest.mark.parametrize("quantize", [quantize_fp8_groups, quantize_int8_groups])
def test_no_tokens_give_no_codes(quantize):
    codes, scales = quantize(torch.empty(0, 256), 128)
    assert codes.shape == (0, 256)
    assert scales.shape == (0, 2)
