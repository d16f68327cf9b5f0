"""Layers split over two ranks in one process: SGLang's loaders take each rank's part."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixedprec_plugin.methods.registry import bind
from tests.cpu.layers import QUANTIZERS, SIZES, Case, K, fill, make_config, make_layer

CASES = [
    Case("fp8", {"weight_block_size": None}),
    Case("fp8", {"weight_block_size": [128, 128]}),
    Case("fp8_channel", {}),
    Case("blockwise_int8", {"weight_block_size": [128, 128]}),
    Case("int8_channel", {}),
    Case("awq", {"bits": 4, "group_size": 128}),
    Case("gptq", {"bits": 4, "group_size": 128}),
    Case("gptq", {"bits": 4, "group_size": -1}),
    Case("gptq", {"bits": 8, "group_size": 64}),
    Case("humming", {"bits": 3, "group_size": 64}),
    Case("nvfp4", {"keep_input_scale": False}),
]


def _stored(case: Case, sizes: tuple[int, ...]) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(size, K, generator=generator).mul_(0.02).bfloat16() for size in sizes]
    arguments = bind(case.method, dict(case.arguments))[1]
    quantize = QUANTIZERS[case.method].quantize
    return [quantize(weight, arguments, torch.bfloat16) for weight in weights]


def _ranks(
    linear: Any,
    case: Case,
    kind: str,
    stored: list[dict[str, torch.Tensor]],
    make_group: Callable[[int], Any] = lambda rank: SimpleNamespace(
        rank_in_group=rank, world_size=2
    ),
) -> list[Any]:
    """The layer of every one of two ranks."""
    from sglang.srt.runtime_context import get_parallel

    layers = []
    for rank in range(2):
        group = make_group(rank)
        sizes = dict.fromkeys(("tp_size", "attn_tp_size", "moe_tp_size"), 2)
        ranks = {"tp_rank": rank, "attn_tp_rank": rank}
        groups = {"tp_group": group, "attn_tp_group": group}
        with get_parallel().override(**sizes, **ranks, **groups):
            layers.append(make_layer(linear, kind, make_config(case), SIZES[kind], K))
        fill(layers[-1], kind, stored)
    return layers


@pytest.mark.parametrize("num_tokens", [1, 70])
@pytest.mark.parametrize("kind", ["column", "merged", "qkv"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_column_parallel_ranks_hold_the_rows_of_the_whole(linear_module, case, kind, num_tokens):
    stored = _stored(case, SIZES[kind])
    whole = make_layer(linear_module, kind, make_config(case), SIZES[kind], K)
    fill(whole, kind, stored)
    x = torch.randn(num_tokens, K).bfloat16()
    parts = [
        layer.quant_method.apply(layer, x) for layer in _ranks(linear_module, case, kind, stored)
    ]
    halves = [part.split([size // 2 for size in SIZES[kind]], dim=1) for part in parts]
    joined = torch.cat([torch.cat(shard, dim=1) for shard in zip(*halves, strict=True)], dim=1)
    expected = whole.quant_method.apply(whole, x)
    # Sums in float32 may come in another order in a matmul of another width.
    assert (joined != expected).double().mean() <= 0.002
    assert torch.allclose(joined.float(), expected.float(), rtol=2**-7, atol=1e-3)


def _connected(folder: Path, timeout_s: float = 60.0) -> Callable[[int], Any]:
    """Groups of two ranks that are threads of this process, over gloo as ranks of a server."""
    from sglang.srt.distributed.parallel_state import GroupCoordinator

    store = torch.distributed.FileStore(str(folder / "store"), 2)
    timeout = datetime.timedelta(seconds=timeout_s)

    class Group(GroupCoordinator):
        """Without the groups of processes that SGLang's constructor makes."""

        def __init__(self, rank: int) -> None:
            self.rank_in_group, self.world_size, self._gloo = rank, 2, None

        @property
        def gloo(self) -> Any:
            if self._gloo is None:
                args = (store, self.rank_in_group, 2, timeout)
                self._gloo = torch.distributed.ProcessGroupGloo(*args)
            return self._gloo

        def send(self, tensor: torch.Tensor, dst: int | None = None) -> None:
            self.gloo.send([tensor], 1 - self.rank_in_group, 0).wait()

        def recv(
            self, size: torch.Size, dtype: torch.dtype, src: int | None = None
        ) -> torch.Tensor:
            tensor = torch.empty(size, dtype=dtype)
            self.gloo.recv([tensor], 1 - self.rank_in_group, 0).wait()
            return tensor

        def all_gather(
            self, input_: torch.Tensor, dim: int = -1, output_tensor_list: Any = None
        ) -> torch.Tensor:
            parts = [torch.empty_like(input_) for _ in range(2)]
            self.gloo.allgather([parts], [input_]).wait()
            return torch.cat(parts, dim=dim)

    return Group


@pytest.mark.parametrize("num_tokens", [1, 70])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_row_parallel_ranks_add_up_to_the_whole(linear_module, case, num_tokens, tmp_path):
    stored = _stored(case, SIZES["row"])
    whole = make_layer(linear_module, "row", make_config(case), SIZES["row"], K)
    fill(whole, "row", stored)
    x = torch.randn(num_tokens, K).bfloat16()
    ranks = _ranks(linear_module, case, "row", stored, _connected(tmp_path))
    with ThreadPoolExecutor(2) as threads:
        halves = x.chunk(2, dim=1)
        parts = threads.map(
            lambda layer, half: layer.quant_method.apply(layer, half), ranks, halves
        )
    total = sum(part.float() for part in parts)
    expected = whole.quant_method.apply(whole, x).float()
    if case.method not in ("awq", "gptq", "humming", "nvfp4"):
        assert torch.equal(total, expected)
        return
    # Where only weights are quantized each rank rounds its part to bfloat16, as on CUDA.
    difference = (total - expected).square().mean().sqrt()
    assert difference < 0.005 * total.square().mean().sqrt()


@pytest.mark.parametrize("block_size", [None, [128, 128]])
def test_no_tokens_pass_no_sums_between_ranks(linear_module, block_size, tmp_path):
    case = Case("fp8", {"weight_block_size": block_size})
    stored = _stored(case, SIZES["row"])
    group = _connected(tmp_path, timeout_s=0.1)
    layer = _ranks(linear_module, case, "row", stored, group)[1]
    assert layer.quant_method.apply(layer, torch.zeros(0, K // 2).bfloat16()).shape == (0, 640)
