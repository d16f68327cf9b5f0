"""Cures what SGLang's GPTQ Marlin method gets wrong for experts, on CUDA and on the CPU.

As of SGLang 0.5.23 (layers/quantization/gptq/schemes/gptq_moe.py):

- :236, :245  scales are float16 whatever the model runs in, and the kernel asserts that they are
  of the activation's dtype (fused_moe_triton/fused_marlin_moe.py:233): no bfloat16 model runs.
- :198  without act order the down projection's scales get the groups of all ranks on every rank:
  the loader fills 1/tp of them, and the kernel finds a wrong group size.
- :290, :300  two parameters of sort indices, which no checkpoint holds, look like empty weights.

And the order of the gate and up projections' scales, see `marlin_scales`.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.quantization.gptq import GPTQMarlinConfig
from sglang.srt.layers.quantization.gptq.schemes import GPTQMarlinMoEScheme

from mixedprec_plugin.errors import MethodError, Problem
from mixedprec_plugin.experts.marlin_scales import gate_up_scales_in_order


class RepairedGPTQMarlinMoEScheme(GPTQMarlinMoEScheme):
    """SGLang's scheme; the parameters that it creates and the order of its scales are repaired."""

    def create_weights(
        self, layer: FusedMoE, *args: Any, params_dtype: torch.dtype, **kwargs: Any
    ) -> None:
        """Create the parameters.

        Raises:
            MethodError: the layer needs what Marlin's experts do not compute.
        """
        check_marlin_experts(layer, self.quant_config)
        super().create_weights(layer, *args, params_dtype=params_dtype, **kwargs)
        repair_parameters(layer, self.quant_config, params_dtype)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Repack the layer for Marlin."""
        with gate_up_scales_in_order(layer, self.quant_config.group_size):
            super().process_weights_after_loading(layer)


class GPTQExpertsConfig(GPTQMarlinConfig):
    """`GPTQMarlinConfig` whose experts have the repaired parameters.

    The method that a layer gets is SGLang's own `GPTQMarlinMoEMethod`.
    """

    def get_moe_scheme(self, layer: FusedMoE) -> RepairedGPTQMarlinMoEScheme:
        """The scheme that `GPTQMarlinMoEMethod` runs."""
        return RepairedGPTQMarlinMoEScheme(self)


def repair_parameters(layer: FusedMoE, config: GPTQMarlinConfig, params_dtype: torch.dtype) -> None:
    """Give the parameters that SGLang created the dtype and shape that its kernels want.

    Args:
        layer: the experts, their parameters just created; changed in place.
        config: the GPTQ config.
        params_dtype: dtype that the model runs in.
    """
    for name in ("w13_scales", "w2_scales"):
        parameter = getattr(layer, name)
        parameter.data = parameter.data.to(params_dtype)
    if config.group_size != -1:
        num_groups = layer.intermediate_size_per_partition // config.group_size
        for name in ("w2_scales", "w2_qzeros"):
            parameter = getattr(layer, name)
            parameter.data = parameter.data[:, :num_groups].clone()
    for name in ("w13_g_idx_sort_indices", "w2_g_idx_sort_indices"):
        parameter = getattr(layer, name)
        parameter.data = parameter.data[:, :0].clone()


def check_marlin_experts(layer: FusedMoE, config: GPTQMarlinConfig) -> None:
    """Refuse what `GPTQMarlinMoEMethod` would take and compute wrongly.

    Raises:
        MethodError: act order under tensor parallelism (a rank has the scales of its own columns
            and needs all), or a router weight on the input, which Marlin ignores.
    """
    found = {
        f"act order (desc_act) over {layer.moe_tp_size} ranks": (
            config.desc_act and layer.moe_tp_size > 1
        ),
        "the router weight on the input": layer.moe_runner_config.apply_router_weight_on_input,
    }
    texts = [text for text, present in found.items() if present]
    if texts:
        raise MethodError(
            Problem(
                where=layer.layer_name,
                what=f"SGLang's GPTQ experts do not compute {', '.join(texts)}",
                remedy="give the experts another method",
                rule="experts-form",
            )
        )
