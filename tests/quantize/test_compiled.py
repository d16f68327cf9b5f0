"""`quantize.compiled`: the bits of torch's arithmetic, whatever the weight."""

from __future__ import annotations

import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numba.core.caching
import pytest
import torch

from mixedprec_plugin.errors import ShapeError
from mixedprec_plugin.quantize import chunks, compiled_packing, loops, packing
from tests.quantize.methods import CASES, Case, case

# 200: no whole tiles of 128, rows of 16 or words of 16 columns
SHAPES = ((200, 576), (8, 4096), (136, 64))
GROUPS = (*(case("awq", group_size=size) for size in (32, 64, 128)),
          *(case("gptq", bits=bits, group_size=size) for bits in (4, 8) for size in (64, 128)),
          case("blockwise_int8", weight_block_size=[64, 64]))  # fmt: skip
methods = pytest.mark.parametrize("method", CASES, ids=str)


def both(make: Callable[[], Mapping[str, torch.Tensor]]) -> None:
    """Check that torch and compiled loops make the same bits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "LEAST_COMPILED", math.inf)
        by_torch = make()
        patch.setattr(chunks, "LEAST_COMPILED", 1)
        compiled = make()
    assert by_torch.keys() == compiled.keys()
    for suffix, tensor in by_torch.items():
        assert compiled[suffix].dtype == tensor.dtype
        assert compiled[suffix].shape == tensor.shape
        assert compiled[suffix].is_contiguous()
        ours, theirs = (x.reshape(-1).view(torch.uint8) for x in (compiled[suffix], tensor))
        assert torch.equal(ours, theirs), suffix


def same(method: Case, weight: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> None:
    both(lambda: method.quantize(weight, dtype))


def bell(N: int, K: int, std: float = 0.02) -> torch.Tensor:
    generator = torch.Generator().manual_seed(N * K)
    return torch.randn(N, K, generator=generator).mul_(std).bfloat16()


@methods
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(method: Case, shape: tuple[int, int]) -> None:
    same(method, bell(*shape))


@pytest.mark.parametrize("method", GROUPS, ids=str)
def test_group_sizes(method: Case) -> None:
    same(method, bell(200, 1152 if method.arguments.get("group_size") == 128 else 576))


@methods
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("std", [1e-40, 1e-37, 1e-6, 1.0, 100.0])
def test_magnitudes(method: Case, std: float, dtype: torch.dtype) -> None:
    # 1e-40: subnormal numbers, whose scales are held up
    weight = bell(64, 128, std)
    if method.method == "nvfp4" and std == 1e-6:  # it refuses what is all small
        weight[-1, -1] = 1.0
    same(method, weight, dtype)


@methods
def test_signs_and_zeros(method: Case) -> None:
    weight = bell(64, 256)
    weight[:16] = weight[:16].abs()
    weight[16:32] = -weight[16:32].abs()
    weight[32:40] = 0.0
    weight[40:48] = -0.0
    weight[48:, ::3] = 0.0
    same(method, weight)


@methods
def test_quotients_that_are_halfway_between_codes(method: Case) -> None:
    # scales of 1 or a power of two: every quarter of a code
    steps = torch.arange(-510, 510).float().div_(4).repeat(8, 8)[:, :8064]
    same(method, torch.cat([steps, steps / 8, -steps]).bfloat16())


@pytest.mark.parametrize("method", [case("nvfp4"), case("mxfp4")], ids=str)
def test_fp4_of_other_dtypes_and_views(method: Case) -> None:
    same(method, torch.randn(200, 576, generator=torch.Generator().manual_seed(0)))
    # the largest of a block is 6 times its scale; others are halfway between codes, or beside it
    halfway = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    beside = [halfway.nextafter(halfway + sign) for sign in (-1, 1)]
    block = torch.cat([torch.tensor([6.0, 4.0, 0.0]), halfway, *beside, -halfway, halfway[:1]])
    scales = torch.arange(8, 16).float()[:, None] / 1024
    same(method, (block.repeat(8, 4)[:, :128] * scales).contiguous())
    same(method, torch.randn(64, 128).mul_(1e-39))
    same(method, torch.randn(64, 128).half())
    same(method, bell(128, 64).t())
    offset = torch.randn(64 * 128 + 1)[1:].view(64, 128)
    same(method, offset)
    same(method, offset.bfloat16())


@methods
def test_every_number(method: Case) -> None:
    bits = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16)
    # the range of a group is finite, too
    finite = bits[bits.abs() < 2.0**127]
    order = torch.randperm(len(finite), generator=torch.Generator().manual_seed(0))
    # in order, tiles are of a few magnitudes; in disorder the largest ones decide
    same(method, finite.view(8, -1))
    same(method, finite[order].view(8, -1))


@methods
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused(
    method: Case, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "LEAST_COMPILED", 1)
    weight = bell(16, 128)
    weight[5, 70] = weight[9, 3] = bad
    message = f"weight: 2 of 2048 values are not finite, the first {bad!r} at [5, 70]"
    with pytest.raises(ShapeError, match=f"^{re.escape(message)}"):
        method.quantize(weight)


@methods
def test_threads(method: Case) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        same(method, bell(1000, 576))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bits", [4, 8])
def test_words_along_k(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (200, 72), dtype=torch.uint8)
    words = torch.zeros(72 * bits // 32, 216, dtype=torch.int32)
    compiled_packing.pack_columns(codes, bits, words, 8, along_k=True)
    assert torch.equal(words[:, 8:208], packing.pack(codes, bits).t())
    assert not words[:, :8].any()
    assert not words[:, 208:].any()


def test_words_of_awq() -> None:
    codes = torch.randint(0, 16, (200, 72), dtype=torch.uint8)
    words = torch.zeros(72, 27, dtype=torch.int32)
    compiled_packing.pack_columns(codes, 4, words, 1, along_k=False)
    assert torch.equal(words[:, 1:26], packing.pack_awq(codes))
    assert not words[:, [0, 26]].any()


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="of x86")
@pytest.mark.slow
def test_without_avx_512() -> None:
    features = "+avx2,+fma,+bmi,+bmi2,+avx,+sse4.2,+lzcnt,+popcnt,+f16c"
    cpu = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": features}
    files = [__file__, str(Path(__file__).with_name("test_compiled_decoding.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    command += ["-k", "every or halfway or words or shapes or quantized or bits or zero_points"]
    done = subprocess.run(command, env={**os.environ, **cpu}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_small_weights_and_other_dtypes_stay_with_torch() -> None:
    large = torch.empty(1024, 1024, dtype=torch.bfloat16)
    assert chunks.is_compiled(large)
    assert not chunks.is_compiled(large[1:])
    assert not chunks.is_compiled(large.t()[:, :])
    assert not chunks.is_compiled(large.to("meta"))
    assert not chunks.is_compiled(large.float())


def test_without_a_folder_to_keep_it_in_it_is_compiled_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(numba.core.caching.CacheImpl, "_locator_classes", [])
    assert loops.compiled(lambda x: x + 1)(41) == 42
