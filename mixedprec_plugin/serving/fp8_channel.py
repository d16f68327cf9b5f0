"""SGLang's per-channel FP8, with what its models ask of every FP8 method.

DeepSeek's and GLM-4-MoE's models read `quant_method.quant_config.weight_block_size` of shared
experts whose weight is FP8 (models/deepseek_v2.py:968, models/glm4_moe.py:519), and
`W8A8Fp8LinearMethod` has no `quant_config`. They do so while they are built: the methods that run
stay SGLang's own.
"""

from __future__ import annotations

import torch
from sglang.srt.layers.quantization.base_config import QuantizeMethodBase
from sglang.srt.layers.quantization.w8a8_fp8 import W8A8Fp8Config, W8A8Fp8LinearMethod


class ChannelFp8Config(W8A8Fp8Config):
    """`W8A8Fp8Config` whose linear methods know their config.

    Attributes:
        weight_block_size: None, there are no blocks.
    """

    weight_block_size: list[int] | None = None

    @classmethod
    def get_name(cls) -> str:
        """The method's name in presets."""
        return "fp8_channel"

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """SGLang's own method; None where the layer is none that is quantized."""
        method = super().get_quant_method(layer, prefix)
        if isinstance(method, W8A8Fp8LinearMethod):
            method.quant_config = self
        return method
