"""The reference's activation quantizers, against the kernels' formulas worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.activations import (
    QuantizedInputLinear,
    WeightOnlyLinear,
    fp8_group,
    fp8_token,
    input_quantizer,
    int8_group,
    scales_by_row,
)


def test_fp8_group_scales_each_group_to_448() -> None:
    x = torch.tensor([[448.0, 17.0, 0.0, 1.0, 44.8, 1.7, 0.0, 0.1]])
    codes, scales = fp8_group(x, 4)
    # e4m3 steps by 2 from 16 to 32, and 17 is a tie that goes to the even 16.
    assert codes.tolist() == [[448.0, 16.0, 0.0, 1.0, 448.0, 16.0, 0.0, 1.0]]
    torch.testing.assert_close(scales, torch.tensor([[1.0, 0.1]]))


def test_fp8_token_has_one_scale_a_row_and_keeps_a_zero_row() -> None:
    x = torch.tensor([[448.0, 17.0, 44.8, 1.7], [0.0, 0.0, 0.0, 0.0]])
    codes, scales = fp8_token(x)
    # 44.8 lies between 44 and 48; 1.7 between 1.625 and 1.75.
    assert codes.tolist() == [[448.0, 16.0, 44.0, 1.75], [0.0, 0.0, 0.0, 0.0]]
    assert scales.tolist() == [[1.0], [0.0]]


def test_int8_group_truncates_towards_zero() -> None:
    x = torch.tensor([[127.0, 1.9, -1.9, 0.5, -254.0, 3.9, 2.0, -4.0]])
    codes, scales = int8_group(x, 4)
    assert codes.tolist() == [[127.0, 1.0, -1.0, 0.0, -127.0, 1.0, 1.0, -2.0]]
    assert scales.tolist() == [[1.0, 2.0]]


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
    for found, wanted in zip(quantizer(x), expected(x), strict=True):
        assert torch.equal(found, wanted)


def test_activations_of_per_channel_fp8_are_a_tokens() -> None:
    assert input_quantizer("fp8_channel", {}) is fp8_token


def test_static_activation_scales_are_refused() -> None:
    with pytest.raises(ValueError, match="activation_scheme: 'static' has no reference"):
        input_quantizer("fp8", {"weight_block_size": None, "activation_scheme": "static"})


def test_linear_multiplies_codes_and_scales_of_every_block() -> None:
    codes = torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 1.0, 0.0, -1.0]])
    scales = scales_by_row(torch.tensor([[0.5, 2.0], [1.0, 3.0]]), 2, [1, 2])
    layer = QuantizedInputLinear(codes, scales, torch.ones(2), lambda x: int8_group(x, 2))
    # activations 127, 1 (scale 1) and -127, 2 (truncated, scale 2)
    output = layer(torch.tensor([[[127.0, 1.9, -254.0, 5.0]]]))
    first = 127 * 1 * 0.5 + 2 * -127 * 2 * 2.0 + 1
    second = 1 * 1 * 1.0 + -1 * 2 * 2 * 3.0 + 1
    assert output.tolist() == [[[first, second]]]


def test_scales_of_ragged_blocks_and_of_one_tensor_reach_every_row() -> None:
    blocks = scales_by_row(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 3, [2, 128])
    assert blocks.tolist() == [[1.0, 2.0], [1.0, 2.0], [3.0, 4.0]]
    assert scales_by_row(torch.tensor([5.0]), 2, None).tolist() == [[5.0], [5.0]]


def test_weight_only_linear_does_not_round_its_weight() -> None:
    layer = WeightOnlyLinear(torch.tensor([[1.0 + 2**-8, -1.0]]), None)
    output = layer(torch.tensor([[256.0, 256.0]], dtype=torch.bfloat16))
    # bfloat16 has no 1 + 2**-8: with a rounded weight this would be 0 or 2
    assert output.dtype == torch.bfloat16
    assert output.tolist() == [[1.0]]
