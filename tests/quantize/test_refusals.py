"""Weights and stored tensors that are refused, and what the message says."""

from __future__ import annotations

import re

import pytest
import torch

from mixedprec_plugin.errors import MethodError, ShapeError
from tests.quantize.methods import CASES, Case, case

methods = pytest.mark.parametrize("method", CASES, ids=str)


@methods
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weight_that_is_not_finite_is_refused(method: Case, bad: float) -> None:
    weight = torch.ones(16, 128, dtype=torch.bfloat16)
    weight[5, 70] = weight[9, 3] = bad
    message = (
        f"weight: 2 of 2048 values are not finite, the first {bad!r} at [5, 70] "
        "(expected finite values); check the checkpoint's file, or keep this layer in bf16"
    )
    with pytest.raises(ShapeError, match=f"^{re.escape(message)}$"):
        method.quantize(weight)


@methods
def test_first_bad_value_is_found_beyond_the_first_chunk(method: Case) -> None:
    weight = torch.ones(1024, 4096)
    weight[1023, 4095] = float("nan")
    with pytest.raises(ShapeError, match=r"1 of 4194304 .* nan at \[1023, 4095\]"):
        method.quantize(weight)


@pytest.mark.parametrize("name", ["awq", "gptq"])
def test_group_that_does_not_divide_is_refused(name: str) -> None:
    message = (
        "weight: group size 128 does not divide K = 576 (expected a divisor of K, or -1); "
        "use group_size 64, 32, -1, or keep this layer in bf16"
    )
    with pytest.raises(ShapeError, match=f"^{re.escape(message)}$"):
        case(name, group_size=128).quantize(torch.ones(16, 576))


@pytest.mark.parametrize("name", ["awq", "gptq"])
def test_rows_that_do_not_fill_words_are_refused(name: str) -> None:
    with pytest.raises(ShapeError, match=r"^weight: N = 20 does not fill .* multiple of 8\)"):
        case(name).quantize(torch.ones(20, 128))


def test_columns_that_do_not_fill_words_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"^weight: K = 20 does not fill .* multiple of 8\)"):
        case("gptq", group_size=-1).quantize(torch.ones(16, 20))


@methods
def test_other_than_a_matrix_of_floats_is_refused(method: Case) -> None:
    with pytest.raises(ShapeError, match=r"^weight: shape \[2, 16, 128\] \(expected a non-empty"):
        method.quantize(torch.ones(2, 16, 128))
    with pytest.raises(ShapeError, match=r"^weight: shape \[0, 128\] \(expected a non-empty"):
        method.quantize(torch.ones(0, 128))
    with pytest.raises(ShapeError, match=r"^weight: dtype torch.int8 \(expected float16"):
        method.quantize(torch.ones(16, 128, dtype=torch.int8))
    with pytest.raises(ShapeError, match=r"^weight: dtype torch.float8_e4m3fn \(expected"):
        method.quantize(torch.ones(16, 128).to(torch.float8_e4m3fn))


@pytest.mark.parametrize("name", ["awq", "gptq"])
def test_weight_too_large_for_float16_scales_is_refused(name: str) -> None:
    weight = torch.ones(16, 128)
    weight[3, 3] = 2e6
    with pytest.raises(
        ShapeError, match=r"^weight: values as large as 2e\+06 need scales beyond 65504"
    ):
        case(name).quantize(weight, torch.float16)
    assert case(name).quantize(weight, torch.bfloat16)["scales"].isfinite().all()


@pytest.mark.parametrize(
    ("name", "argument", "value", "message"),
    [
        ("gptq", "sym", False, r"^sym: False cannot be quantized to \(expected True\); use sym: t"),
        ("gptq", "desc_act", True, r"^desc_act: True cannot be quantized to \(expected False\)"),
        ("awq", "zero_point", False, r"^zero_point: False cannot be quantized to .* use method gp"),
        ("fp8", "activation_scheme", "static", r"^activation_scheme: 'static' needs an input_s"),
    ],
)
def test_what_rounding_cannot_make_is_refused(
    name: str, argument: str, value: object, message: str
) -> None:
    plain = case(name)
    asked = Case(plain.method, {**plain.arguments, argument: value})
    with pytest.raises(MethodError, match=message):
        asked.quantize(torch.ones(16, 128))


@methods
def test_missing_tensors_are_named(method: Case) -> None:
    tensors = method.quantize(torch.ones(16, 128))
    for suffix in tensors.keys() - {"g_idx"}:
        rest = {other: tensor for other, tensor in tensors.items() if other != suffix}
        with pytest.raises(ShapeError, match=f"^{suffix}: missing .*expected"):
            method.dequantize(rest)


@methods
def test_tensors_of_another_shape_are_named(method: Case) -> None:
    tensors = method.quantize(torch.randn(256, 384))
    for suffix in tensors.keys() - {"weight", "qweight"}:
        other = {**tensors, suffix: tensors[suffix].new_zeros(3, 7)}
        with pytest.raises(ShapeError, match=rf"^{suffix}: shape \[3, 7\] \(expected"):
            method.dequantize(other)


def test_codes_of_another_dtype_are_named() -> None:
    fp8 = case("fp8").quantize(torch.ones(16, 128))
    with pytest.raises(ShapeError, match=r"^weight: torch.float8_e4m3fn \[16, 128\] \(expected"):
        case("blockwise_int8").dequantize(fp8)


def test_group_index_out_of_range_is_refused() -> None:
    gptq = case("gptq", group_size=64)
    tensors = gptq.quantize(torch.ones(16, 128))
    tensors["g_idx"] = tensors["g_idx"] * 2
    with pytest.raises(ShapeError, match=r"^g_idx: groups 0\.\.2 \(expected 0\.\.1\); check group"):
        gptq.dequantize(tensors)
