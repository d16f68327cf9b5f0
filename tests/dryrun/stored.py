"""Layers as other tools store them: what a weight cannot be quantized to without calibration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]
_GROUP = 128


def _bf16(name: str, weight: torch.Tensor) -> Tensors:
    return {f"{name}.weight": weight.bfloat16()}


def _fp8_static(name: str, weight: torch.Tensor) -> Tensors:
    scale = weight.abs().max() / 448
    return {
        f"{name}.weight": (weight / scale).to(torch.float8_e4m3fn),
        f"{name}.weight_scale": scale,
        f"{name}.input_scale": torch.tensor(0.01),
    }


def _gptq_act_order(name: str, weight: torch.Tensor) -> Tensors:
    N, K = weight.shape
    # the order follows from the inputs, so all shards of a fused module have the same
    order = torch.randperm(K, generator=torch.Generator().manual_seed(K))
    limits = torch.iinfo(torch.int32)
    return {
        f"{name}.qweight": torch.randint(limits.min, limits.max, (K // 8, N), dtype=torch.int32),
        f"{name}.qzeros": torch.full((K // _GROUP, N // 8), 0x77777777, dtype=torch.int32),
        f"{name}.scales": torch.rand(K // _GROUP, N).to(torch.float16),
        f"{name}.g_idx": (order // _GROUP).to(torch.int32),
    }


FORMATS: Mapping[str, Callable[[str, torch.Tensor], Tensors]] = {
    "bf16": _bf16,
    "fp8_static": _fp8_static,
    "gptq_act_order": _gptq_act_order,
}
"""Format -> (layer name, weight [N, K]) -> the layer's stored tensors."""

QUANTIZATION_CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "bf16": {},
    "fp8_static": {"quant_method": "fp8", "activation_scheme": "static"},
    "gptq_act_order": {
        "quant_method": "gptq", "bits": 4, "group_size": _GROUP, "sym": True, "desc_act": True,
        "checkpoint_format": "gptq", "lm_head": False,
    },
}  # fmt: skip
"""Format -> `quantization_config` of config.json."""
