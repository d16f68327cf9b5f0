"""What the configs of the CPU platform share: they decide as SGLang's do, and hand out ours."""

from __future__ import annotations

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
from sglang.srt.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead


class CpuConfig(QuantizationConfig):
    """Makes a config of SGLang's one of the CPU platform, with the same constructor.

    Attributes:
        methods: for linear layers and for experts; subclasses of what SGLang's config hands out.
    """

    methods: tuple[type, ...] = ()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The layer's method; None where the layer is none that is quantized.

        Raises:
            MethodError: the config asks for a form that the CPU does not run.
        """
        if not isinstance(layer, LinearBase | FusedMoE | ParallelLMHead):
            return None
        method = super().get_quant_method(layer, prefix)
        for own in self.methods:
            if issubclass(own, type(method)):
                self.check_form(prefix)
                # SGLang may have given the layer a config of its own, as GPTQ's `dynamic` asks
                return own(getattr(method, "quant_config", self))
        return method

    def check_form(self, where: str) -> None:
        """Refuse what would run, and compute something else than CUDA does."""
