"""Faults of SGLang's that `methods.nvfp4.sglang` cures: when one is gone, so is its cure."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.sglang, pytest.mark.filterwarnings("ignore")]
K = 128


class _Layer(torch.nn.Module):
    """A layer as SGLang has it before it is repacked for Marlin."""

    def __init__(self, N: int) -> None:
        super().__init__()
        self.quant_config = SimpleNamespace(group_size=16)
        self.output_size_per_partition, self.input_size_per_partition = N, K
        self.logical_widths = [N]
        self.params_dtype = torch.bfloat16
        tensors = {
            "weight": torch.zeros(N, K // 2, dtype=torch.uint8),
            "weight_scale": torch.ones(N, K // 16).to(torch.float8_e4m3fn),
            "weight_scale_2": torch.ones(1),
            "weight_global_scale": torch.tensor(1.0),
            "bias": torch.arange(N).bfloat16(),
        }
        for name, tensor in tensors.items():
            setattr(self, name, torch.nn.Parameter(tensor, requires_grad=False))


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What only a GPU repacks has the shape that it would have."""
    from sglang.srt.layers.quantization import marlin_utils_fp4

    def repack(size_k: int, size_n: int, **_: Any) -> torch.Tensor:
        return torch.zeros(size_k // 16, 2 * size_n, dtype=torch.int32)

    monkeypatch.setattr(marlin_utils_fp4, "gptq_marlin_repack", repack, raising=False)
    monkeypatch.setattr(
        marlin_utils_fp4, "marlin_make_workspace", lambda _: torch.zeros(1), raising=False
    )


def test_sglang_orders_a_bias_that_it_adds_itself() -> None:
    from sglang.srt.layers.quantization import marlin_utils_fp4

    layer = _Layer(128)
    marlin_utils_fp4.prepare_nvfp4_layer_for_marlin(layer)
    assert layer.bias.tolist() != list(range(128))
    assert sorted(layer.bias.tolist()) == list(range(128))
    # no kernel is given it, which would know the order
    assert "output.add_(bias)" in inspect.getsource(marlin_utils_fp4)


def test_a_bias_stays_in_order_and_is_as_wide_as_padded_outputs() -> None:
    from sglang.srt.layers.quantization.modelopt_quant import ModelOptNvFp4A16LinearMethod

    from mixedprec_plugin.methods.nvfp4.sglang import NvFp4Config, cured

    layer = _Layer(100)
    method = ModelOptNvFp4A16LinearMethod(NvFp4Config(keeps_input_scale=False))
    assert cured(method) is method
    method.process_weights_after_loading(layer)
    # Marlin's tiles are 64 wide
    assert layer.weight.shape == (K // 16, 2 * 128)
    assert layer.bias.tolist() == [*range(100), *[0] * 28]
