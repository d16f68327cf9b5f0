"""The order in which Marlin's kernel for experts reads the scales of gate and up projections."""

from __future__ import annotations

from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.quantization.base_scheme import BaseMoEScheme
from sglang.srt.layers.quantization.marlin_utils import marlin_moe_permute_scales


class ScalesInOrder(BaseMoEScheme):
    """Puts right how a scheme of SGLang's orders `w13_scales` while it repacks a layer.

    Marlin reads the scales in one order where a column has several groups and in another where it
    has one. SGLang chooses by the inner features of a rank, which are the down projection's K; the
    gate and up projections' is the hidden size. Where a rank has no more inner features than a
    group, 128 say, their scales come out in the wrong order, and so do the layer's outputs.
    Source: SGLang 0.5.23, hardware_backend/gpu/quantization/{gptq_kernels.py:288,
    awq_kernels.py:203}; seen in the outputs of an H100.
    """

    def process_weights_after_loading(self, layer: FusedMoE) -> None:
        """Repack the layer for Marlin: `w13_scales` [E, K / G, 2N] as loaded, its K and G."""
        group_size = self.quant_config.group_size
        num_groups, size_n = layer.w13_scales.shape[1:]
        size_k = num_groups * group_size
        inner = layer.intermediate_size_per_partition
        is_right = group_size == -1 or (group_size < inner) == (group_size < size_k)
        loaded = None if is_right else layer.w13_scales.detach().clone()
        super().process_weights_after_loading(layer)
        if loaded is not None:
            ordered = marlin_moe_permute_scales(loaded, size_k, size_n, group_size)
            layer.w13_scales.data.copy_(ordered)
