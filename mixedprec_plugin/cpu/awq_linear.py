"""AWQ linear layers on the CPU: SGLang's weights and loaders, a torch matmul."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization.awq import AWQConfig
from sglang.srt.layers.quantization.awq.schemes import AWQLinearScheme

from mixedprec_plugin.cpu.weight_only import dequantize_awq, matmul
from mixedprec_plugin.errors import Problem, ShapeError


class CpuAWQLinearScheme(AWQLinearScheme):
    """SGLang's `AWQLinearScheme` with a torch matmul in the activation's dtype."""

    def _init_kernel(self, quant_config: AWQConfig) -> SimpleNamespace:
        """SGLang's kernel object needs a GPU; nothing here asks it for anything."""
        return SimpleNamespace()

    def create_weights(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        params_dtype: torch.dtype,
        weight_loader: Any,
        **sizes: Any,
    ) -> None:
        """Create SGLang's parameters; a group size of -1 becomes the layer's own K.

        Raises:
            ShapeError: group size -1 on a layer whose K is split over ranks: every rank would
                need the scales of the whole, which SGLang's AWQ parameters cannot hold.
        """
        if self.quant_config.group_size == -1:
            input_size = sizes.get("input_size", input_size_per_partition)
            if input_size != input_size_per_partition:
                raise ShapeError(
                    Problem(
                        where="",
                        what=f"AWQ group size -1 with K = {input_size} split over ranks "
                        f"(expected a group size that divides {input_size_per_partition})",
                        remedy="use group size 128, or tensor parallel 1",
                    )
                )
            self.quant_config = copy.copy(self.quant_config)
            self.quant_config.group_size = input_size
        super().create_weights(
            layer=layer,
            input_size_per_partition=input_size_per_partition,
            output_partition_sizes=output_partition_sizes,
            params_dtype=params_dtype,
            weight_loader=weight_loader,
            **sizes,
        )

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Leave the parameters as they were loaded, so that they can be loaded again."""

    def apply_weights(
        self, layer: LinearBase, x: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Multiply [..., K] by the dequantized weight, [..., N]; the bias is added afterwards."""
        weight = dequantize_awq(layer.qweight.data, layer.qzeros.data, layer.scales.data)
        return matmul(x, weight, bias)
