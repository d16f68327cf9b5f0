"""AWQ linear layers on the CPU: SGLang's weights and loaders, a torch matmul."""

from __future__ import annotations

import copy
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization.awq import AWQConfig, awq
from sglang.srt.layers.quantization.awq.schemes import AWQLinearScheme

from mixedprec_plugin.cpu.int4 import Int4Weight, unpack_int4
from mixedprec_plugin.cpu.packed_linear import ReloadableMethod, replace_weight
from mixedprec_plugin.cpu.rows import multiply_rows
from mixedprec_plugin.cpu.weight_only import dequantize, multiply
from mixedprec_plugin.errors import Problem, ShapeError
from mixedprec_plugin.quantize.packing import AWQ_PACK_FACTOR, pack_awq, unpack_awq


class AWQLinearMethod(ReloadableMethod, awq.AWQLinearMethod):
    """SGLang's `AWQLinearMethod`, which can be loaded a second time.

    The name is SGLang's: linear layers choose their weight loader by it
    (sglang/srt/layers/linear.py:140).
    """


class CpuAWQLinearScheme(AWQLinearScheme):
    """SGLang's `AWQLinearScheme` with torch matmuls in the activation's dtype."""

    quant_config: AWQConfig
    _weight: Int4Weight | None = None

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
        """Replace `qweight` by the layout of torch's kernel, where it takes the layer."""
        if self._weight is not None:
            return
        words, scales = layer.qweight.data, layer.scales.data
        self._weight = Int4Weight.pack_rows(
            partial(_unpack_rows, words),
            scales.shape[1],
            words.shape[0],
            scales,
            unpack_awq(layer.qzeros.data),
        )
        replace_weight(layer, self._weight)

    def restore_weights_before_loading(self, layer: LinearBase) -> None:
        """Give `qweight` AWQ's layout again; does nothing where it has it."""
        if self._weight is not None:
            layer.qweight.data = pack_awq(unpack_int4(self._weight.packed)).contiguous()
            self._weight = None

    def apply_weights(
        self, layer: LinearBase, x: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Multiply [..., K] by the weight, [..., N]; the bias is added afterwards."""
        return multiply_rows(partial(self._multiply, layer), x, bias)

    def _multiply(self, layer: LinearBase, rows: torch.Tensor) -> torch.Tensor:
        """[T, K] -> [T, N]."""
        if self._weight is not None:
            return self._weight.multiply(rows)
        codes, zeros = unpack_awq(layer.qweight.data), unpack_awq(layer.qzeros.data)
        return multiply(rows, dequantize(codes, zeros, layer.scales.data))


def _unpack_rows(words: torch.Tensor, rows: slice) -> torch.Tensor:
    """Codes of some rows, uint8 [rows, K], out of AWQ's int32 [K, N/8]."""
    return unpack_awq(words[:, rows.start // AWQ_PACK_FACTOR : rows.stop // AWQ_PACK_FACTOR])
