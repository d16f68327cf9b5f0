"""NVFP4 on the CPU platform: SGLang's weights and loaders, the arithmetic of Marlin's kernels."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.quantization import modelopt_quant
from sglang.srt.layers.quantization.base_config import QuantizeMethodBase

from mixedprec_plugin.cpu.config import CpuConfig
from mixedprec_plugin.cpu.experts import LoopedExperts, Prepare, Product, Rows, check_experts, weigh
from mixedprec_plugin.cpu.fp4 import multiply, whole_scale
from mixedprec_plugin.cpu.linear import QuantizedLinear
from mixedprec_plugin.methods.nvfp4 import GROUP_SIZE
from mixedprec_plugin.methods.nvfp4.sglang.cuda import (
    SerializedConfig,
    drop_unused,
    share_expert_scales,
    share_scales,
)


class MarlinLinear(QuantizedLinear):
    """Multiplies a linear layer as Marlin's kernels do."""

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Give the shards one scale; the parameters can be loaded again."""
        share_scales(layer)

    def multiply(self, layer: LinearBase, rows: torch.Tensor) -> torch.Tensor:
        product = multiply(rows, layer.weight.data, layer.weight_scale.data)
        return product.mul_(whole_scale(layer.weight_scale_2.data[0], rows.dtype))


class ModelOptNvFp4A16LinearMethod(MarlinLinear, modelopt_quant.ModelOptNvFp4A16LinearMethod):
    """SGLang's `ModelOptNvFp4A16LinearMethod` with torch arithmetic."""

    def create_weights(self, layer: LinearBase, *args: Any, **kwargs: Any) -> None:
        """Create SGLang's parameters but "input_scale", which no kernel reads."""
        super().create_weights(layer, *args, **kwargs)
        del layer.input_scale


class ModelOptFp4LinearMethod(MarlinLinear, modelopt_quant.ModelOptFp4LinearMethod):
    """SGLang's `ModelOptFp4LinearMethod` with torch arithmetic, as on GPUs that have no FP4.

    Its "input_scale" is loaded, and not read: activations stay in 16 bits.
    """


class ModelOptNvFp4FusedMoEMethod(LoopedExperts, modelopt_quant.ModelOptNvFp4FusedMoEMethod):
    """SGLang's `ModelOptNvFp4FusedMoEMethod` with torch arithmetic."""

    preset_name = "nvfp4"

    def __init__(self, quant_config: SerializedConfig) -> None:
        # not SGLang's constructor, which asks for the card; as it has them for Marlin's kernels
        self.quant_config = quant_config
        self.enable_flashinfer_trtllm_moe = False
        self.use_flashinfer_trtllm_weight_layout = False

    def create_weights(self, layer: FusedMoE, *args: Any, **kwargs: Any) -> None:
        """Create SGLang's parameters, but for what only other kernels read.

        Raises:
            MethodError, ShapeError: what the CPU platform does not run, or Marlin does not.
        """
        check_experts(layer, self.preset_name, ("silu",), "block of inputs", (GROUP_SIZE,))
        modelopt_quant.ModelOptNvFp4FusedMoEMethod.create_weights(self, layer, *args, **kwargs)
        drop_unused(layer, self.quant_config)

    def get_moe_runner_backend(self, layer: FusedMoE) -> None:
        """None: SGLang's name for a method that runs without one of its runners."""

    def process_weights_after_loading(self, layer: FusedMoE) -> None:
        """Give gate and up one scale; the parameters can be loaded again."""
        share_expert_scales(layer)

    def prepare(self, layer: FusedMoE) -> tuple[Prepare, Prepare]:
        """Activations -> their products with gate and up weights, and with down weights."""
        wholes = layer.w13_weight_scale_2.data[:, 0], layer.w2_weight_scale_2.data
        return (
            partial(self._prepare, layer.w13_weight.data, layer.w13_weight_scale.data, wholes[0]),
            partial(self._prepare, layer.w2_weight.data, layer.w2_weight_scale.data, wholes[1]),
        )

    def _prepare(
        self, packed: torch.Tensor, scales: torch.Tensor, wholes: torch.Tensor, x: torch.Tensor
    ) -> Product:
        """Make ready activations [R, K], which are not quantized.

        The scale of the whole is multiplied by the router weight first, both of them rounded to the
        activation's dtype. On the first product Marlin has no router weight, and Triton's kernel
        multiplies in float32.
        """
        is_early = self.moe_runner_config.apply_router_weight_on_input

        def run(expert: int, rows: Rows, router_weights: torch.Tensor | None) -> torch.Tensor:
            product = multiply(x[rows], packed[expert], scales[expert])
            whole = whole_scale(wholes[expert], x.dtype)
            if router_weights is None or is_early:
                return weigh(product * whole, router_weights, x.dtype)
            return product * (whole * router_weights.to(x.dtype)).unsqueeze(1)

        return run


class CpuNvFp4Config(CpuConfig, SerializedConfig):
    """`ModelOptFp4Config` on the CPU."""

    methods = (
        ModelOptNvFp4A16LinearMethod,
        ModelOptFp4LinearMethod,
        ModelOptNvFp4FusedMoEMethod,
    )

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The layer's method; None where the layer is none that is quantized.

        Experts are not given SGLang's method first: its constructor refuses CPUs.
        """
        if isinstance(layer, FusedMoE):
            return ModelOptNvFp4FusedMoEMethod(self)
        return super().get_quant_method(layer, prefix)
