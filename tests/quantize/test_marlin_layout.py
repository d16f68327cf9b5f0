"""What we store, through Marlin's layout and back: nibble order, zero points, scales and signs."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mixedprec_plugin.methods.registry import bind
from tests.quantize import marlin_layout as marlin
from tests.quantize.arrays import as_arrays
from tests.quantize.methods import Case
from tests.reference.dequantize import dequantize_method

N, K = 192, 256
GPTQ = [{"bits": bits, "group_size": size} for bits in (4, 8) for size in (-1, 32, 128)]
AWQ = [{"group_size": size} for size in (32, 64, 128)]


@pytest.fixture(scope="module")
def sglang_marlin() -> SimpleNamespace:
    """SGLang's Python side of Marlin: what it permutes at load, and what its own tests expect."""
    names = ("sgl_kernel", "sgl_kernel.scalar_type")
    before = {name: sys.modules.get(name) for name in names}
    # sgl_kernel needs a driver; of it the tests' module takes one class, for an annotation
    stand_ins = {name: ModuleType(name) for name in names}
    stand_ins["sgl_kernel.scalar_type"].ScalarType = object  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sglang.srt.layers.quantization import marlin_utils

        sys.modules.update(stand_ins)
        try:
            from sglang.test import test_marlin_utils
        finally:
            for name, module in before.items():
                if module is None:
                    del sys.modules[name]
                else:
                    sys.modules[name] = module
    return SimpleNamespace(load=marlin_utils, test=test_marlin_utils)


def weight() -> torch.Tensor:
    """[N, K], with groups whose largest number is positive in some and negative in others."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(N, K, generator=generator).bfloat16()


def quantized(method: str, arguments: Mapping[str, Any]) -> tuple[Case, dict[str, torch.Tensor]]:
    case = Case(method, bind(method, arguments)[1])
    return case, case.quantize(weight())


def words(tensor: torch.Tensor) -> marlin.Words:
    return tensor.contiguous().numpy().view(np.uint32)


def through_marlin(
    sglang: Any, method: str, bits: int, group_size: int, stored: Mapping[str, torch.Tensor]
) -> np.ndarray:
    """Repack stored tensors as SGLang does at load, and read the weight [N, K] as Marlin does."""
    num_groups = 1 if group_size == -1 else K // group_size
    if method == "gptq":
        packed = marlin.repack(marlin.gptq_codes(words(stored["qweight"]), bits), bits)
        zeros = np.full((num_groups, N), 1 << (bits - 1), dtype=np.int64)
    else:
        packed = marlin.repack(marlin.awq_codes(words(stored["qweight"])), bits)
        permuted_zeros = sglang.load.awq_to_marlin_zero_points(stored["qzeros"], num_groups, N, 4)
        zeros = marlin.read_zero_points(words(permuted_zeros)).astype(np.int64)
    permuted = sglang.load.marlin_permute_scales(stored["scales"], K, N, group_size)
    values = permuted.float().numpy()
    is_channelwise = group_size in (-1, K)
    scales = (
        marlin.read_channel_scales(values) if is_channelwise else marlin.read_group_scales(values)
    )
    codes = marlin.read_codes(packed, bits).astype(np.int64)
    rows = K // num_groups
    grouped = (codes - zeros.repeat(rows, axis=0)).astype(np.float32) * scales.repeat(rows, axis=0)
    result: np.ndarray = grouped.T
    return result


def expected(case: Case, stored: Mapping[str, torch.Tensor]) -> np.ndarray:
    return dequantize_method(case.method, as_arrays(stored), case.arguments)


def distance(read: np.ndarray) -> float:
    return float(np.abs(read - weight().float().numpy()).max())


def one_step(stored: Mapping[str, torch.Tensor]) -> float:
    """A code is off by at most one step, where it is clipped; scales are rounded to bfloat16."""
    return float(stored["scales"].abs().max()) + float(weight().abs().max()) * 2**-8


@pytest.mark.parametrize("bits", [4, 8])
def test_repacking_is_what_sglangs_own_tests_expect(sglang_marlin: Any, bits: int) -> None:
    codes = np.random.default_rng(0).integers(0, 1 << bits, (K, N), dtype=np.uint32)
    order = sglang_marlin.test.get_weight_perm(bits)
    theirs = sglang_marlin.test.marlin_weights(
        torch.from_numpy(codes.astype(np.int32)), K, N, bits, order
    )
    assert np.array_equal(marlin.repack(codes, bits), words(theirs))


@pytest.mark.parametrize("bits", [4, 8])
def test_matmul_reads_the_codes_that_were_repacked(bits: int) -> None:
    codes = np.random.default_rng(1).integers(0, 1 << bits, (K, N), dtype=np.uint32)
    assert np.array_equal(marlin.read_codes(marlin.repack(codes, bits), bits), codes)


@pytest.mark.parametrize("arguments", GPTQ, ids=str)
def test_gptq_weights_survive_marlin(sglang_marlin: Any, arguments: dict[str, int]) -> None:
    case, stored = quantized("gptq", arguments)
    read = through_marlin(sglang_marlin, "gptq", arguments["bits"], arguments["group_size"], stored)
    assert np.array_equal(read, expected(case, stored))
    assert distance(read) <= one_step(stored)


@pytest.mark.parametrize("arguments", AWQ, ids=str)
def test_awq_weights_survive_marlin(sglang_marlin: Any, arguments: dict[str, int]) -> None:
    case, stored = quantized("awq", arguments)
    read = through_marlin(sglang_marlin, "awq", 4, arguments["group_size"], stored)
    assert np.array_equal(read, expected(case, stored))
    assert distance(read) <= one_step(stored)


def test_gptq_zeros_are_the_ones_that_marlin_takes_for_granted() -> None:
    for bits in (4, 8):
        _, stored = quantized("gptq", {"bits": bits, "group_size": 128})
        zeros = words(stored["qzeros"])
        mask = (1 << bits) - 1
        for shift in range(0, 32, bits):
            assert set(((zeros >> shift) & mask).ravel() + 1) == {1 << (bits - 1)}


@pytest.mark.parametrize("group_size", [-1, 32, 128])
def test_negative_gptq_scales_survive_marlin(sglang_marlin: Any, group_size: int) -> None:
    _, stored = quantized("gptq", {"bits": 4, "group_size": group_size})
    scales = stored["scales"]
    assert 0.1 < float((scales < 0).float().mean()) < 0.9
    permuted = sglang_marlin.load.marlin_permute_scales(scales, K, N, group_size)
    assert permuted.dtype == scales.dtype
    assert torch.equal(permuted.sort(dim=1).values, scales.sort(dim=1).values)


def test_act_order_is_undone_by_sorted_rows() -> None:
    generator = np.random.default_rng(2)
    codes = generator.integers(0, 16, (K, N), dtype=np.uint32)
    order = generator.permutation(K)
    read = marlin.read_codes(marlin.repack(codes[order], 4), 4)
    assert np.array_equal(read[np.argsort(order)], codes)


def swap_nibbles(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    octets = stored["qweight"].contiguous().view(torch.uint8)
    swapped = (octets << 4) | (octets >> 4)
    return {**stored, "qweight": swapped.view(torch.int32)}


def shift_zeros(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**stored, "qzeros": stored["qzeros"] + 0x11111111}


def transpose_scales(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    scales = stored["scales"]
    return {**stored, "scales": scales.t().contiguous().view(scales.shape)}


@pytest.mark.parametrize("method", ["awq", "gptq"])
@pytest.mark.parametrize("fault", [swap_nibbles, shift_zeros, transpose_scales])
def test_fault_in_what_is_stored_does_not_hide(sglang_marlin: Any, method: str, fault: Any) -> None:
    case, stored = quantized(method, {"group_size": 64})
    damaged = fault(stored)
    assert {name: tensor.shape for name, tensor in damaged.items()} == {
        name: tensor.shape for name, tensor in stored.items()
    }
    whole = expected(case, stored)
    if method == "gptq" and fault is shift_zeros:
        # Marlin never looks at GPTQ's zeros: the fault is one for the reader of the checkpoint
        assert not np.array_equal(expected(case, damaged), whole)
        return
    assert not np.array_equal(through_marlin(sglang_marlin, method, 4, 64, damaged), whole)
