"""The reference's activation quantizers, against the kernels' formulas worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.activations import (
    QuantizedInputLinear,
    fp8_group,
    fp8_token,
    input_quantizer,
    int8_group,
)


def test_fp8_group_scales_each_group_to_448() -> None:
    x = torch.tensor([[448.0, 17.0, 0.0, 1.0, 44.8, 1.7, 0.0, 0.1]])
    # e4m3 steps by 2 from 16 to 32, and 17 is a tie that goes to the even 16.
    expected = torch.tensor([[448.0, 16.0, 0.0, 1.0, 44.8, 1.6, 0.0, 0.1]])
    torch.testing.assert_close(fp8_group(x, 4), expected)


def test_fp8_token_has_one_scale_a_row_and_keeps_a_zero_row() -> None:
    x = torch.tensor([[448.0, 17.0, 44.8, 1.7], [0.0, 0.0, 0.0, 0.0]])
    # 44.8 lies between 44 and 48; 1.7 between 1.625 and 1.75.
    expected = torch.tensor([[448.0, 16.0, 44.0, 1.75], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(fp8_token(x), expected)


def test_int8_group_truncates_towards_zero() -> None:
    x = torch.tensor([[127.0, 1.9, -1.9, 0.5, -254.0, 3.9, 2.0, -4.0]])
    expected = torch.tensor([[127.0, 1.0, -1.0, 0.0, -254.0, 2.0, 2.0, -4.0]])
    torch.testing.assert_close(int8_group(x, 4), expected)


@pytest.mark.parametrize("method", ["bf16", "awq", "gptq"])
def test_weight_only_methods_leave_the_input_alone(method: str) -> None:
    assert input_quantizer(method, {}) is None


@pytest.mark.parametrize(
    ("method", "block", "expected"),
    [
        ("fp8", None, fp8_token),
        ("fp8", [128, 128], fp8_group),
        ("blockwise_int8", [128, 128], int8_group),
    ],
)
def test_method_and_block_choose_the_quantizer(method: str, block: Any, expected: Any) -> None:
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    quantizer = input_quantizer(
        method, {"weight_block_size": block, "activation_scheme": "dynamic"}
    )
    assert quantizer is not None
    assert torch.equal(quantizer(x), expected(x))


def test_static_activation_scales_are_refused() -> None:
    with pytest.raises(ValueError, match="activation_scheme: 'static' has no reference"):
        input_quantizer("fp8", {"weight_block_size": None, "activation_scheme": "static"})


def test_linear_multiplies_the_quantized_input() -> None:
    layer = QuantizedInputLinear(torch.eye(4), torch.ones(4), fp8_token)
    output = layer(torch.tensor([[448.0, 17.0, 44.8, 1.7]]))
    torch.testing.assert_close(output, torch.tensor([[449.0, 17.0, 45.0, 2.75]]))
