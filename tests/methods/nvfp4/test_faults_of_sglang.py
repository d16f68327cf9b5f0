"""Faults of SGLang's that `methods.nvfp4.sglang` cures: when one is gone, so is its cure."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch

pytestmark = [pytest.mark.sglang, pytest.mark.filterwarnings("ignore")]
N, K = 128, 128


class _Layer(torch.nn.Module):
    """A layer as SGLang has it before it is repacked for Marlin."""

    def __init__(self) -> None:
        super().__init__()
        self.quant_config = SimpleNamespace(group_size=16)
        self.output_size_per_partition, self.input_size_per_partition = N, K
        self.params_dtype = torch.bfloat16
        self.weight = torch.nn.Parameter(
            torch.zeros(N, K // 2, dtype=torch.uint8), requires_grad=False
        )
        scales = torch.ones(N, K // 16).to(torch.float8_e4m3fn)
        self.weight_scale = torch.nn.Parameter(scales, requires_grad=False)
        self.weight_global_scale = torch.nn.Parameter(torch.tensor(1.0), requires_grad=False)
        self.bias = torch.nn.Parameter(torch.arange(N).bfloat16(), requires_grad=False)


def test_sglang_orders_a_bias_that_it_adds_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.layers.quantization import marlin_utils_fp4

    for name, stand_in in (
        ("gptq_marlin_repack", lambda **_: torch.zeros(K // 16, 2 * N, dtype=torch.int32)),
        ("marlin_make_workspace", lambda _device: torch.zeros(1)),
    ):
        monkeypatch.setattr(marlin_utils_fp4, name, stand_in, raising=False)
    layer = _Layer()
    marlin_utils_fp4.prepare_nvfp4_layer_for_marlin(layer)
    assert layer.bias.tolist() != list(range(N))
    assert sorted(layer.bias.tolist()) == list(range(N))
    # no kernel is given it, which would know the order
    assert "output.add_(bias)" in inspect.getsource(marlin_utils_fp4)
