"""Per-channel FP8 around SGLang's own class."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from mixedprec_plugin.methods.construct import build_config
from mixedprec_plugin.methods.registry import bind
from tests.cpu.layers import make_layer


def linear_method(linear: ModuleType, device: str) -> Any:
    """The method of a linear layer."""
    config = build_config(*bind("fp8_channel", {}), device, capability=90)
    return make_layer(linear, "column", config, (128,), 128).quant_method


def test_linear_method_is_sglangs_own_and_answers_its_models(linear_module: ModuleType) -> None:
    from sglang.srt.layers.quantization.w8a8_fp8 import W8A8Fp8LinearMethod

    method = linear_method(linear_module, "cuda")
    assert type(method) is W8A8Fp8LinearMethod
    assert method.quantization_config.is_checkpoint_fp8_serialized
    # models/deepseek_v2.py:931, 968
    assert method.quant_config.get_name() == "fp8_channel"
    assert method.quant_config.weight_block_size is None


def test_method_of_the_cpu_answers_them_too(linear_module: ModuleType) -> None:
    method = linear_method(linear_module, "cpu")
    assert method.quant_config.get_name() == "fp8_channel"
    assert method.quant_config.weight_block_size is None
