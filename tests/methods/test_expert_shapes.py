"""Shape rules of experts, on the sizes of published models."""

from __future__ import annotations

import re
from typing import Any

import pytest

from mixedprec_plugin.methods.interface import Device, LayerShape
from tests.methods import shapes as shapes_
from tests.methods.shapes import SCHEMES
from tests.methods.test_shape_rules import settings


def expert(hidden: int, inner: int, tp_size: int = 1) -> tuple[LayerShape, LayerShape]:
    """Gate (or up) and down of one expert."""
    return (
        LayerShape(inner, hidden, (inner, inner), "column", tp_size, is_expert=True),
        LayerShape(hidden, inner, (hidden,), "row", tp_size, is_expert=True),
    )


def check(
    name: str, given: dict[str, Any], shapes: tuple[LayerShape, ...], device: Device
) -> list[str]:
    return [text for shape in shapes for text, _ in shapes_.check(name, given, shape, device)]


QWEN3 = (2048, 768)
MIXTRAL = (4096, 14336)
GLM_AIR = (4096, 1408)
DEEPSEEK = (7168, 2048)


# fp8.py:1588, blockwise_int8.py:284 and marlin_utils.py:227 of SGLang 0.5.23, evaluated by hand
@pytest.mark.parametrize(
    ("name", "group", "sizes", "fits", "fits_not"),
    [
        ("fp8_block", None, QWEN3, (1, 2, 3, 6), (4, 8)),
        ("fp8_block", None, MIXTRAL, (1, 2, 4, 8, 16), (32,)),
        ("fp8_block", None, GLM_AIR, (1, 11), (2, 4, 8)),
        ("fp8_block", None, DEEPSEEK, (1, 2, 4, 8, 16), (32,)),
        ("int8", None, GLM_AIR, (1, 11), (2, 4)),
        ("gptq", 128, QWEN3, (1, 2), (4, 8)),
        ("gptq", 64, QWEN3, (1, 2, 4), (8,)),
        ("gptq", 128, GLM_AIR, (1, 11), (2, 4)),
        ("gptq", 64, GLM_AIR, (1, 2), (4, 8)),
        ("gptq", 32, GLM_AIR, (1, 2), (4, 8)),
        ("awq", 128, MIXTRAL, (1, 2, 4, 8), (32,)),
        ("awq", 64, GLM_AIR, (1, 2), (4, 8)),
    ],
)
def test_published_experts_fit(
    name: str,
    group: int | None,
    sizes: tuple[int, int],
    fits: tuple[int, ...],
    fits_not: tuple[int, ...],
) -> None:
    given = {} if group is None else {"group_size": group}
    for tp_size in fits:
        assert check(name, given, expert(*sizes, tp_size), "cuda") == [], tp_size
    for tp_size in fits_not:
        assert check(name, given, expert(*sizes, tp_size), "cuda"), tp_size


def test_marlin_for_experts_has_tiles_of_its_own() -> None:
    """1408 over 4 ranks is 352: groups of 32 divide it, the tiles do not."""
    assert check("gptq", {"group_size": 32}, expert(*GLM_AIR, 4), "cuda") == [
        "N = 704 per rank of gate and up together is not a multiple of 128, which Marlin kernels "
        "for experts need",
        "K = 352 per rank is not a multiple of 64, which Marlin kernels for experts need",
    ]
    assert check("gptq", {"group_size": 32}, expert(*GLM_AIR, 4), "cpu") == []
    # 64 inputs a rank are enough for an expert, and too few for a linear layer
    assert check("gptq", {"group_size": 64}, (expert(2048, 64)[1],), "cuda") == []
    lone = LayerShape(2048, 64, (2048,), "row")
    assert (
        "K = 64 is not a multiple of 128" in check("gptq", {"group_size": 64}, (lone,), "cuda")[0]
    )


def test_split_that_is_uneven_is_refused() -> None:
    assert check("bf16", {}, expert(*GLM_AIR, 3), "cuda") == [
        "N = 1408 does not split over 3 ranks", "K = 1408 does not split over 3 ranks",
    ]  # fmt: skip


def test_awq_experts_need_groups() -> None:
    found = check("awq", {"group_size": -1}, expert(*DEEPSEEK), "cpu")
    assert set(found) == {"group_size -1 is not served for experts, SGLang divides by it"}
    assert check("gptq", {"group_size": -1}, expert(*DEEPSEEK), "cuda") == []


def test_act_order_of_experts_is_not_split() -> None:
    found = check("gptq", {"desc_act": True}, expert(*DEEPSEEK, 2), "cuda")
    assert set(found) == {"act order of experts cannot be split over 2 ranks"}
    assert check("gptq", {"desc_act": True}, expert(*DEEPSEEK), "cuda") == []


def test_fp8_experts_of_one_scale_run_in_a_kernel_that_masks() -> None:
    assert check("fp8", {}, expert(100, 72), "cuda") == []


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize(("name", "given"), SCHEMES)
def test_every_remedy_works(name: str, given: dict[str, Any], device: Device) -> None:
    for sizes in (QWEN3, GLM_AIR, (2048, 96), (1000, 192)):
        for tp_size in (1, 2, 4):
            for index, shape in enumerate(expert(*sizes, tp_size)):
                for _, remedy in shapes_.check(name, given, shape, device):
                    for other, typed in settings(remedy, name, given):
                        assert check(other, typed, (shape,), device) == [], (shape, remedy)
                    if fewer := re.search(r"serve with --tp (\d)", remedy):
                        smaller = expert(*sizes, int(fewer[1]))[index]
                        assert check(name, given, (smaller,), device) == [], (shape, remedy)
