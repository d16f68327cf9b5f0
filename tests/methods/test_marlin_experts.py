"""Scales of experts' gate and up projections, in the order in which Marlin reads them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.quantize.marlin_layout import read_channel_scales, read_group_scales

# what SGLang and its packages warn of when they are imported is not ours
pytestmark = [pytest.mark.sglang, pytest.mark.filterwarnings("ignore")]
HIDDEN, INNER, GROUP, EXPERTS = 512, 128, 128, 3


def loaded(method: str, inner: int = INNER) -> Any:
    """A rank's experts as they are loaded, with scales that tell where they came from."""
    layer: Any = torch.nn.Module()
    layer.hidden_size, layer.intermediate_size_per_partition = HIDDEN, inner
    sizes = {"w13": (HIDDEN, 2 * inner), "w2": (inner, HIDDEN)}
    for name, (K, N) in sizes.items():
        packed = (K, N // 8) if method == "awq" else (K // 8, N)
        tensors = {
            "qweight": torch.zeros(EXPERTS, *packed, dtype=torch.int32),
            "scales": torch.arange(EXPERTS * (K // GROUP) * N).view(EXPERTS, K // GROUP, N).float(),
            "qzeros": torch.zeros(EXPERTS, K // GROUP, N // 8, dtype=torch.int32),
            "g_idx": torch.zeros(EXPERTS, 0, dtype=torch.int32),
        }
        for suffix, tensor in tensors.items():
            parameter = torch.nn.Parameter(tensor, requires_grad=False)
            setattr(layer, f"{name}_{suffix}", parameter)
    return layer


def repack(method: str, layer: Any, monkeypatch: pytest.MonkeyPatch, is_ours: bool) -> None:
    """What SGLang's scheme, or ours, does with a loaded layer; codes stay, which need a GPU."""
    from sglang.srt.hardware_backend.gpu.quantization import awq_kernels, gptq_kernels
    from sglang.srt.layers.quantization.awq import AWQMarlinConfig, awq
    from sglang.srt.layers.quantization.gptq import GPTQMarlinConfig

    from mixedprec_plugin.methods.construct import repaired

    config: Any
    if method == "awq":
        monkeypatch.setattr(awq, "verify_marlin_supported", lambda *_, **__: None)  # asks a GPU
        config = AWQMarlinConfig(4, GROUP, True, False, None, {})
        monkeypatch.setattr(awq_kernels, "awq_marlin_moe_repack", lambda codes, *_, **__: codes)
    else:
        config = GPTQMarlinConfig(4, GROUP, False, True, False, {}, {"bits": 4})
        monkeypatch.setattr(gptq_kernels, "gptq_marlin_moe_repack", lambda codes, *_: codes)
    config = repaired(config, [method]) if is_ours else config
    config.get_moe_scheme(layer).process_weights_after_loading(layer)


def read(layer: Any, name: str) -> np.ndarray:
    """Scales by column, as Marlin's threads take them: of one group at the end, of several soon."""
    scales: np.ndarray = getattr(layer, name).numpy()
    reader = read_channel_scales if scales.shape[1] == 1 else read_group_scales
    return np.stack([reader(own) for own in scales])


@pytest.mark.parametrize("method", ["awq", "gptq"])
@pytest.mark.parametrize("inner", [128, 256])
def test_marlin_reads_the_scales_that_were_loaded(
    method: str, inner: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = loaded(method, inner)
    expected = {name: getattr(layer, name).numpy().copy() for name in ("w13_scales", "w2_scales")}
    repack(method, layer, monkeypatch, is_ours=True)
    for name, scales in expected.items():
        np.testing.assert_array_equal(read(layer, name), scales)


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_sglang_orders_gate_and_up_scales_by_the_inner_features(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gptq_kernels.py:288, awq_kernels.py:203: of a rank, which are no more than a group."""
    layer = loaded(method)
    expected = layer.w13_scales.numpy().copy()
    repack(method, layer, monkeypatch, is_ours=False)
    assert (read(layer, "w13_scales") != expected).any()
