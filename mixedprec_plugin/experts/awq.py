"""Cures what SGLang's AWQ Marlin method gets wrong for experts, on CUDA."""

from __future__ import annotations

import torch
from sglang.srt.layers.quantization.awq import AWQMarlinConfig
from sglang.srt.layers.quantization.awq.schemes import AWQMoEScheme

from mixedprec_plugin.experts.marlin_scales import gate_up_scales_in_order


class RepairedAWQMoEScheme(AWQMoEScheme):
    """SGLang's scheme; only the order of the repacked scales is repaired."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Repack the layer for Marlin."""
        with gate_up_scales_in_order(layer, self.quant_config.group_size):
            super().process_weights_after_loading(layer)


class AWQExpertsConfig(AWQMarlinConfig):
    """`AWQMarlinConfig` whose experts have their scales in order.

    The method that a layer gets is SGLang's own `AWQMoEMethod`.
    """

    def get_moe_scheme(self, layer: torch.nn.Module) -> RepairedAWQMoEScheme:
        """The scheme that `AWQMoEMethod` runs."""
        return RepairedAWQMoEScheme(self)
