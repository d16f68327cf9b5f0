from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from mixedprec_plugin.methods.interface import Device, LayerShape
from mixedprec_plugin.methods.registry import bind
from tests.methods.shapes import SCHEMES, check, grid

QKV = LayerShape(N=192, K=576, shard_sizes=(576, 192, 192), parallel="column")
DOWN = LayerShape(N=768, K=2048, shard_sizes=(768,), parallel="row")


@pytest.mark.parametrize(
    ("name", "given", "shape", "problem"),
    [
        (
            "gptq",
            {"group_size": 64},
            QKV,
            (
                "K = 576 is not a multiple of 128, which Marlin kernels need",
                "use method: awq with group_size: 64",
            ),
        ),
        (
            "awq",
            {},
            QKV,
            (
                "group_size 128 does not divide K = 576",
                "use group_size: 64, or use method: fp8",
            ),
        ),
        (
            "fp8_block",
            {},
            LayerShape(192, 768, (768, 192, 192), "column"),
            (
                "N = 192 of a shard of its fused module is not a multiple of 128, "
                "the block size along N",
                "use method: fp8_tensor, or use method: gptq with bits: 8",
            ),
        ),
        (
            "int8",
            {},
            LayerShape(768, 768, (768,), "row", tp_size=4),
            (
                "K = 192 per rank is not a multiple of 128, the block size along K and the group "
                "of its activations",
                "use weight_block_size: [64, 64], or use method: int8_channel, "
                "or serve with --tp 2",
            ),
        ),
        (
            "int8",
            {},
            LayerShape(192, 768, (192,), "column", tp_size=1),
            None,
        ),
        (
            "int8",
            {},
            LayerShape(192, 768, (192,), "column", tp_size=2),
            (
                "N = 96 per rank of the layer is not a multiple of 128, the block size along N",
                "use method: int8_channel, or serve with --tp 1",
            ),
        ),
        (
            "gptq",
            {},
            LayerShape(100, 768, (100,), "column", tp_size=3),
            ("N = 100 does not split over 3 ranks", "use a tensor-parallel size that divides it"),
        ),
        (
            "gptq",
            {},
            LayerShape(96, 768, (96,), "column"),
            (
                "N = 96 is not a multiple of 64, which Marlin kernels need",
                "use method: awq",
            ),
        ),
        (
            "awq",
            {},
            LayerShape(100, 768, (100, 100), "column"),
            (
                "N = 100 is not a multiple of 8, the values packed in a word",
                "use method: int8_channel",
            ),
        ),
        (
            "fp8",
            {},
            LayerShape(100, 768, (100,), "column"),
            (
                "N = 100 is not a multiple of 16, which FP8 matmuls need",
                "use method: blockwise_int8",
            ),
        ),
        (
            "fp8_channel",
            {},
            LayerShape(96, 1024, (96,), "column", tp_size=4),
            (
                "N = 24 per rank is not a multiple of 16, which FP8 matmuls need",
                "use method: int8_channel, or serve with --tp 2",
            ),
        ),
        (
            "awq",
            {"group_size": -1},
            LayerShape(768, 768, (768,), "row", tp_size=2),
            (
                "group_size -1 cannot be split over 2 ranks along K",
                "use group_size: 128, or use method: gptq, or serve with --tp 1",
            ),
        ),
        ("fp16", {}, DOWN, None),
    ],
)
def test_shape_problem_reads(
    name: str, given: dict[str, Any], shape: LayerShape, problem: tuple[str, str] | None
) -> None:
    if name == "fp16":
        problem = (
            "dtype float16 differs from the bfloat16 the model runs in",
            "serve with --dtype float16, or use method: unquantized",
        )
    assert check(name, given, shape)[:1] == ([problem] if problem else [])


@pytest.mark.parametrize(("name", "given"), SCHEMES)
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_multiples_of_128_fit_everything(name: str, given: dict[str, Any], device: Device) -> None:
    is_expert = name == "mxfp4"
    shape = LayerShape(256, 768, (768, 256, 256), "column", is_expert=is_expert)
    assert check(name, given, shape, device) == []
    shape = LayerShape(768, 2048, (768,), "row", is_expert=is_expert)
    assert check(name, given, shape, device) == []


def test_plain_awq_takes_what_marlin_does_not() -> None:
    from mixedprec_plugin.methods.awq import fits_marlin

    arguments = bind("awq", {"group_size": 64})[1]
    assert not fits_marlin(arguments, QKV)
    assert check("awq", {"group_size": 64}, QKV) == []
    assert fits_marlin(arguments, DOWN)


def test_awq_that_fits_marlin_only_as_a_whole_is_refused_on_cuda() -> None:
    """SGLang chooses Marlin before it knows a rank's share: a dry run of its layers showed it."""
    narrow = LayerShape(256, 1024, (256,), "column", tp_size=8)
    text, remedy = check("awq", {}, narrow, "cuda")[0]
    assert text == "N = 32 per rank is not a multiple of 64, which Marlin kernels need"
    assert remedy == "use method: fp8, or serve with --tp 4"
    assert check("awq", {}, narrow, "cpu") == []
    short = LayerShape(1024, 512, (1024,), "row", tp_size=8)
    assert "K = 64 per rank" in check("awq", {"group_size": 64}, short, "cuda")[0][0]


def test_whole_columns_need_marlin_on_cuda_only() -> None:
    assert "Marlin" in check("awq", {"group_size": -1}, QKV, "cuda")[0][0]
    assert check("awq", {"group_size": -1}, QKV, "cpu") == []


def test_cpu_needs_no_marlin_and_no_fp8_matmul() -> None:
    assert check("gptq", {"group_size": 64}, QKV, "cpu") == []
    assert check("fp8", {}, LayerShape(100, 768, (100,), "column"), "cpu") == []


def test_repeated_key_and_value_heads_are_not_split() -> None:
    # 2 key-value heads of 128 on 4 ranks: each rank holds one of them whole.
    shape = LayerShape(256, 1024, (1024, 256, 256), "column", 4, shard_ranks=(4, 2, 2))
    assert check("fp8_block", {}, shape) == []
    split = LayerShape(256, 1024, (1024, 256, 256), "column", 4)
    assert "N = 64 per rank" in check("fp8_block", {}, split)[0][0]


def settings(remedy: str, name: str, given: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The schemes that a remedy tells the reader to type."""
    told = []
    for way in remedy.split(", or "):
        if other := re.fullmatch(r"use method: (\w+)(?: with (.*))?", way):
            told.append((other[1], yaml.safe_load("{" + (other[2] or "") + "}")))
        elif own := re.fullmatch(r"use (\w+: .*)", way):
            told.append((name, {**given, **yaml.safe_load("{" + own[1] + "}")}))
    return told


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize(("name", "given"), SCHEMES)
def test_every_remedy_works(name: str, given: dict[str, Any], device: Device) -> None:
    tried = 0
    for shape in grid():
        for _, remedy in check(name, given, shape, device):
            if remedy == "use a tensor-parallel size that divides it":
                continue
            assert remedy
            for other, arguments in settings(remedy, name, given):
                assert check(other, arguments, shape, device) == [], (shape, remedy)
                tried += 1
            if fewer := re.search(r"serve with --tp (\d)", remedy):
                smaller = LayerShape(
                    shape.N, shape.K, shape.shard_sizes, shape.parallel, int(fewer[1])
                )
                assert check(name, given, smaller, device) == [], (shape, remedy)
    assert tried or name in ("unquantized", "fp8", "fp8_channel", "int8_channel", "nvfp4")
