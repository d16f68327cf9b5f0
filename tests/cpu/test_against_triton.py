"""The arithmetic against SGLang's own Triton kernels, run by Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mixedprec_plugin.cpu import activation
from mixedprec_plugin.cpu.packed import dequantize
from mixedprec_plugin.cpu.scaled_matmul import block_matmul, channel_matmul
from mixedprec_plugin.quantize.packing import unpack_awq
from tests.cpu.context import interpret


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Inputs and outputs of the kernels, computed in a process of their own."""
    return interpret("tests.cpu.triton_kernels", tmp_path_factory.mktemp("triton"))


def _assert_close(ours: torch.Tensor, theirs: torch.Tensor, few: float) -> None:
    """bfloat16 results: at most a share `few` differs, by no more than one rounding."""
    difference = (ours.double() - theirs.double()).abs()
    assert (difference <= 2**-7 * theirs.double().abs().amax(1, keepdim=True)).all()
    assert (difference > 0).double().mean() <= few


def test_int8_groups_are_the_kernels_bit_for_bit(kernels):
    for x, codes, scales in kernels["quantizers"]["int8"]:
        ours, our_scales = activation.quantize_int8_groups(x, 128)
        assert torch.equal(ours, codes)
        assert torch.equal(our_scales, scales)


def test_int8_tokens_are_the_kernels_bit_for_bit(kernels):
    for x, codes, scales in kernels["quantizers"]["int8 tokens"]:
        ours, our_scales = activation.quantize_int8_tokens(x)
        assert torch.equal(ours, codes)
        assert torch.equal(our_scales, scales)


def test_static_fp8_is_the_kernels_bit_for_bit(kernels):
    for x, codes, scale in kernels["quantizers"]["static"]:
        ours = activation.quantize_fp8_static(x, scale)
        assert torch.equal(ours.view(torch.uint8), codes.view(torch.uint8))


def test_fp8_groups_differ_from_triton_by_one_code_in_a_thousand(kernels):
    # The formula is that of the CUDA kernel: 448 / amax rounded once, where Triton rounds
    # amax / 448 and its reciprocal.
    for x, codes, scales in kernels["quantizers"]["fp8"]:
        ours, our_scales = activation.quantize_fp8_groups(x, 128)
        distance = (ours.view(torch.int8).int() - codes.view(torch.int8).int()).abs()
        assert distance.max() <= 1
        assert distance.float().mean() < 1e-3
        assert torch.allclose(our_scales, scales, rtol=2**-23, atol=0)


def test_int8_block_matmul_is_the_kernels_bit_for_bit(kernels):
    for left, scales, right, grid, out in kernels["block_matmuls"]["int8"]:
        ours = block_matmul(left, scales, right, grid, (128, 128), torch.bfloat16)
        assert torch.equal(ours, out)


# The order in which float32 sums a K-block depends on the machine; few sums show it in bfloat16.


def test_fp8_block_matmul_is_the_kernels(kernels):
    for left, scales, right, grid, out in kernels["block_matmuls"]["fp8"]:
        ours = block_matmul(left, scales, right, grid, (128, 128), torch.bfloat16)
        _assert_close(ours, out, few=0.002)


def test_fp8_block_matmul_is_the_kernels_for_hopper(kernels):
    """fp8_kernel.py:822: a part of K is summed on its own, so a few more sums round otherwise."""
    assert len(kernels["hopper_matmuls"]) == 12
    for left, scales, right, grid, out in kernels["hopper_matmuls"]:
        ours = block_matmul(left, scales, right, grid, (128, 128), torch.bfloat16)
        _assert_close(ours, out, few=0.005)


def test_channel_matmul_is_the_kernels(kernels):
    for left, scales, right, channels, out in kernels["channel_matmuls"]:
        ours = channel_matmul(left, scales, right, channels, torch.bfloat16)
        _assert_close(ours, out, few=0.002)


def test_awq_weights_are_the_kernels_bit_for_bit(kernels):
    for qweight, qzeros, scales, out in kernels["awq_weights"]:
        assert torch.equal(dequantize(unpack_awq(qweight), unpack_awq(qzeros), scales), out.t())
