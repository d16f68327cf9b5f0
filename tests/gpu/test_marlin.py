"""SGLang's repacking kernels on a real GPU against Marlin's layout in numpy, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.quantize import marlin_layout as marlin

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    # what SGLang and the compilers of its kernels warn of on a GPU is not ours
    pytest.mark.filterwarnings("ignore"),
]
# N, K of SmolLM2-135M's layers, widened and as they are
SHAPES = [(1280, 768), (768, 768), (3072, 768), (768, 1536), (576, 1536), (640, 1536), (1536, 576)]
NUM_EXPERTS = 3
GROUP = 128


def random_words(num_rows: int, num_columns: int, seed: int = 0) -> torch.Tensor:
    """Random int32 words, all of 32 bits used."""
    words = np.random.default_rng(seed).integers(0, 1 << 32, (num_rows, num_columns), np.uint64)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


def as_words(tensor: torch.Tensor) -> marlin.Words:
    """An int32 tensor of any device as numpy's uint32."""
    return tensor.detach().cpu().contiguous().numpy().view(np.uint32)


def group_index(K: int, seed: int = 0) -> torch.Tensor:
    """An act order: the group of each input feature, int32 [K]."""
    order = torch.randperm(K, generator=torch.Generator().manual_seed(seed))
    return (order // GROUP).int()


def count_differences(got: np.ndarray, expected: np.ndarray) -> str:
    """What a failure shows; empty if all are equal."""
    if got.shape != expected.shape:
        return f"shape {got.shape} (expected {expected.shape})"
    different = int((got != expected).sum())
    return f"{different} of {got.size} differ" if different else ""


@pytest.mark.parametrize("is_ordered", [False, True], ids=["in order", "act order"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_gptq_words_are_repacked_as_written_down(
    gpu: int, report: list[str], N: int, K: int, bits: int, is_ordered: bool
) -> None:
    from sglang.kernels.ops.quantization.gptq_marlin_repack import gptq_marlin_repack
    from sglang.srt.layers.quantization.marlin_utils import marlin_sort_g_idx

    stored = random_words(K * bits // 32, N)
    order = torch.empty(0, dtype=torch.int32, device="cuda")
    rows = np.arange(K)
    if is_ordered:
        index, order = marlin_sort_g_idx(group_index(K).cuda())
        assert bool((index.diff() >= 0).all()), "the group index is not sorted"
        rows = order.cpu().numpy()
        assert sorted(rows) == list(range(K))
    got = as_words(gptq_marlin_repack(stored.cuda(), order, K, N, bits))
    expected = marlin.repack(marlin.gptq_codes(as_words(stored), bits)[rows], bits)
    different = count_differences(got, expected)
    report.append(f"gptq_marlin_repack, {bits} bits, N {N}, K {K}: {different or 'all equal'}")
    assert not different


@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_awq_words_are_repacked_as_written_down(
    gpu: int, report: list[str], N: int, K: int
) -> None:
    from sglang.kernels.ops.quantization.awq_marlin_repack import awq_marlin_repack

    stored = random_words(K, N // 8)
    got = as_words(awq_marlin_repack(stored.cuda(), K, N, 4))
    expected = marlin.repack(marlin.awq_codes(as_words(stored)), 4)
    different = count_differences(got, expected)
    report.append(f"awq_marlin_repack, N {N}, K {K}: {different or 'all equal'}")
    assert not different


@pytest.mark.parametrize("is_ordered", [False, True], ids=["in order", "act order"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("N", "K"), SHAPES[2:5])
def test_gptq_experts_are_repacked_as_written_down(
    gpu: int, N: int, K: int, bits: int, is_ordered: bool
) -> None:
    from sglang.srt.hardware_backend.gpu.quantization.gptq_kernels import gptq_marlin_moe_repack

    stored = torch.stack([random_words(K * bits // 32, N, expert) for expert in range(NUM_EXPERTS)])
    orders = torch.empty(NUM_EXPERTS, 0, dtype=torch.int32)
    rows = [np.arange(K)] * NUM_EXPERTS
    if is_ordered:
        indices = [group_index(K, expert) for expert in range(NUM_EXPERTS)]
        orders = torch.stack([index.argsort(stable=True).int() for index in indices])
        rows = [order.numpy() for order in orders]
    got = as_words(gptq_marlin_moe_repack(stored.cuda(), orders.cuda(), K, N, bits))
    expected = np.stack(
        [
            marlin.repack(marlin.gptq_codes(as_words(own), bits)[order], bits)
            for own, order in zip(stored, rows, strict=True)
        ]
    )
    assert not count_differences(got, expected)


@pytest.mark.parametrize(("N", "K"), SHAPES[2:5])
def test_awq_experts_are_repacked_as_written_down(gpu: int, N: int, K: int) -> None:
    from sglang.kernels.ops.quantization.awq_marlin_repack import awq_marlin_moe_repack

    stored = torch.stack([random_words(K, N // 8, expert) for expert in range(NUM_EXPERTS)])
    order = torch.empty(NUM_EXPERTS, 0, dtype=torch.int32, device="cuda")
    got = as_words(awq_marlin_moe_repack(stored.cuda(), order, K, N, 4))
    expected = np.stack([marlin.repack(marlin.awq_codes(as_words(own)), 4) for own in stored])
    assert not count_differences(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
@pytest.mark.parametrize(("N", "K"), SHAPES[:4])
def test_scales_are_where_the_matmul_reads_them(
    gpu: int, N: int, K: int, group_size: int, dtype: torch.dtype
) -> None:
    from sglang.srt.layers.quantization import marlin_utils

    num_groups = 1 if group_size == -1 else K // group_size
    generator = torch.Generator().manual_seed(0)
    scales = torch.randn(NUM_EXPERTS, num_groups, N, generator=generator).to(dtype)
    read = marlin.read_channel_scales if group_size == -1 else marlin.read_group_scales
    permuted = marlin_utils.marlin_moe_permute_scales(scales.cuda(), K, N, group_size)
    assert permuted.dtype == dtype
    for own, back in zip(scales, permuted.cpu(), strict=True):
        assert not count_differences(read(back.float().numpy()), own.float().numpy())
    one = marlin_utils.marlin_permute_scales(scales[0].cuda(), K, N, group_size)
    assert torch.equal(one, permuted[0])


@pytest.mark.parametrize(("N", "K"), SHAPES[:4])
def test_zero_points_are_where_the_matmul_reads_them(gpu: int, N: int, K: int) -> None:
    from sglang.srt.layers.quantization import marlin_utils

    num_groups = K // GROUP
    stored = torch.stack([random_words(num_groups, N // 8, seed) for seed in range(NUM_EXPERTS)])
    permuted = marlin_utils.moe_awq_to_marlin_zero_points(stored.cuda(), num_groups, N, 4)
    for own, back in zip(stored, permuted, strict=True):
        expected = marlin.awq_codes(as_words(own))
        assert not count_differences(marlin.read_zero_points(as_words(back)), expected)
    one = marlin_utils.awq_to_marlin_zero_points(stored[0].cuda(), num_groups, N, 4)
    assert torch.equal(one, permuted[0])


@pytest.mark.parametrize("kind", ["column", "merged", "row"])
@pytest.mark.parametrize("method", ["awq", "gptq_int4", "gptq_int8", "gptq_act_order"])
def test_loaded_layer_holds_what_was_stored(gpu: int, method: str, kind: str) -> None:
    from tests.gpu import layers

    made = layers.plan_linear(method, kind, 1)
    with layers.linear(made, kind, 1) as loaded:
        got = marlin.read_codes(as_words(loaded.layer.qweight), _bits(method))
        scales = marlin.read_group_scales(loaded.layer.scales.detach().cpu().float().numpy())
        order = loaded.layer.g_idx_sort_indices.cpu().numpy()
        shards = [loaded.stored[name].tensors for name in layers.KINDS[kind].weights]
        codes = np.concatenate([_stored_codes(method, own) for own in shards], axis=1)
        expected = codes[order] if method == "gptq_act_order" else codes
        assert not count_differences(got, expected)
        stored_scales = torch.cat([own["scales"] for own in shards], 1).float().numpy()
        assert not count_differences(scales, stored_scales)


def _bits(method: str) -> int:
    return 8 if method == "gptq_int8" else 4


def _stored_codes(method: str, tensors: Any) -> marlin.Codes:
    words = as_words(tensors["qweight"])
    return marlin.awq_codes(words) if method == "awq" else marlin.gptq_codes(words, _bits(method))
