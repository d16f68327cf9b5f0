"""Weights that are quantized on a GPU: the same bits as on the CPU, in bounded memory."""

from __future__ import annotations

import functools
import time
from pathlib import Path

import pytest
import torch

from mixedprec_plugin.compose.on_device import MAX_BYTES, DeviceRounding
from mixedprec_plugin.compose.stream import (
    Quantize,
    VirtualCheckpoint,
    compose_layer,
    round_to_nearest,
)
from mixedprec_plugin.plan.model import Plan
from tests.checkpoints import write_llama
from tests.compose.test_parts import EVERY, made, model
from tests.tensors import raw

__all__ = ["model"]
pytestmark = [pytest.mark.gpu, pytest.mark.slow]
_BOUND = 1.25 * 2**30


@pytest.mark.parametrize("scheme", [scheme for scheme in EVERY if scheme != "unquantized"])
def test_codes_and_scales_are_those_of_the_cpu(gpu: int, model: Path, scheme: str) -> None:
    plan = made(model, scheme)
    expected = dict(iter(VirtualCheckpoint(plan)))
    for name, tensor in _stream(plan, DeviceRounding(torch.device("cuda"))):
        assert torch.equal(raw(tensor.cpu()), raw(expected.pop(name).contiguous())), name
    assert not expected


def test_pieces_of_a_large_weight_arrive_whole_in_bounded_memory(
    gpu: int, tmp_path: Path, report: list[str]
) -> None:
    # its MLP is 96 MiB a matrix: six pieces, so that both buffers are used again
    sizes = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 1}
    plan = made(write_llama(tmp_path / "model", **sizes), "awq, group_size: 128")
    num_bytes = sum(x.bytes_before for x in plan.layers if x.action == "quantize")
    assert num_bytes < MAX_BYTES
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, start = torch.cuda.memory_allocated(), time.perf_counter()
    found = dict(_stream(plan, DeviceRounding(torch.device("cuda"))))
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() - before
    start = time.perf_counter()
    for name, tensor in _stream(plan, round_to_nearest):
        assert torch.equal(raw(found.pop(name).cpu()), raw(tensor.contiguous())), name
    on_cpu = time.perf_counter() - start
    assert peak < _BOUND
    report.append(
        f"quantized at load, awq: {num_bytes / seconds / 1e9:.2f} GB of bf16 a second on the GPU, "
        f"{num_bytes / on_cpu / 1e9:.2f} on {torch.get_num_threads()} threads of the CPU, peak "
        f"{peak / 2**20:.0f} MiB with what was made"
    )


def _stream(plan: Plan, quantize: Quantize) -> VirtualCheckpoint:
    return VirtualCheckpoint(plan, compose=functools.partial(compose_layer, quantize=quantize))
