"""GPTQ linear layers on the CPU: SGLang's weights and loaders, torch matmuls."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization.gptq import GPTQMarlinConfig, gptq
from sglang.srt.layers.quantization.gptq.schemes import GPTQMarlinLinearScheme

from mixedprec_plugin.cpu.int4 import Int4Weight, unpack_int4
from mixedprec_plugin.cpu.int8 import Int8Weight
from mixedprec_plugin.cpu.packed_linear import ReloadableMethod, replace_weight
from mixedprec_plugin.cpu.rows import multiply_rows
from mixedprec_plugin.cpu.weight_only import multiply
from mixedprec_plugin.quantize.packing import pack, unpack


class GPTQMarlinLinearMethod(ReloadableMethod, gptq.GPTQMarlinLinearMethod):
    """SGLang's `GPTQMarlinLinearMethod`, which can be loaded a second time.

    The name is SGLang's: linear layers choose their weight loader by it
    (sglang/srt/layers/linear.py:140).
    """


class CpuGPTQLinearScheme(GPTQMarlinLinearScheme):
    """SGLang's `GPTQMarlinLinearScheme` with torch matmuls in the activation's dtype.

    Marlin's zero point is fixed, 2**(bits - 1): `qzeros` is loaded and not read.
    """

    quant_config: GPTQMarlinConfig

    def __init__(self, quant_config: GPTQMarlinConfig) -> None:
        # Not the parent's constructor: it asks for the card's compute capability.
        self.quant_config = quant_config
        self.kernel = SimpleNamespace()
        self._weight: Int4Weight | Int8Weight | None = None
        self._order: torch.Tensor | None = None

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Replace `qweight` by a layout that is fast here, where groups are runs of K.

        With act order the columns are sorted by group, and the activations as they come.
        """
        if self._weight is not None:
            return
        self._order = None
        groups, scales = layer.g_idx.data, layer.scales.data
        if self.quant_config.desc_act and not _is_in_order(groups, scales.shape[0]):
            self._order = groups.argsort(stable=True)
            if not _is_in_order(groups[self._order], scales.shape[0]):
                return
        read = partial(self._read_codes, layer.qweight.data)
        num_rows, num_columns = scales.shape[1], groups.shape[0]
        if self.quant_config.weight_bits == 4:
            self._weight = Int4Weight.pack_rows(read, num_rows, num_columns, scales, 8)
        else:
            self._weight = Int8Weight.pack(read(slice(num_rows)), scales)
        replace_weight(layer, self._weight)

    def _read_codes(self, words: torch.Tensor, rows: slice) -> torch.Tensor:
        """Codes of some rows, uint8 [rows, K], columns in the order that they are multiplied in."""
        codes = unpack(words[:, rows].t(), self.quant_config.weight_bits)
        return codes if self._order is None else codes[:, self._order]

    def restore_weights_before_loading(self, layer: LinearBase) -> None:
        """Give `qweight` GPTQ's layout again; does nothing where it has it."""
        if self._weight is None:
            return
        if isinstance(self._weight, Int4Weight):
            codes = unpack_int4(self._weight.packed)
        else:
            codes = self._weight.unpack()
        if self._order is not None:
            codes = codes[:, self._order.argsort()]
        layer.qweight.data = pack(codes, self.quant_config.weight_bits).t().contiguous()
        self._weight = None

    def apply_weights(
        self, layer: LinearBase, x: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Multiply [..., K] by the weight, [..., N]; the bias is added afterwards."""
        return multiply_rows(partial(self._multiply, layer), x, bias)

    def _multiply(self, layer: LinearBase, rows: torch.Tensor) -> torch.Tensor:
        """[T, K] -> [T, N]."""
        if self._weight is None:
            return multiply(rows, self._dequantize(layer))
        return self._weight.multiply(rows if self._order is None else rows[:, self._order])

    def _dequantize(self, layer: LinearBase) -> torch.Tensor:
        """The weight [N, K] from the checkpoint's layout."""
        bits, scales = self.quant_config.weight_bits, layer.scales.data
        steps = unpack(layer.qweight.data.t(), bits).to(scales.dtype).sub_(2 ** (bits - 1))
        if self.quant_config.desc_act:
            return steps.mul_(scales[layer.g_idx.data].t())
        grouped = steps.view(steps.shape[0], scales.shape[0], -1)
        return grouped.mul_(scales.t().unsqueeze(2)).view(steps.shape)


def _is_in_order(groups: torch.Tensor, num_groups: int) -> bool:
    """Whether the groups [K] are runs of equal length: 0 0 0 1 1 1 ..."""
    runs = torch.arange(num_groups, dtype=groups.dtype)
    length, rest = divmod(groups.numel(), num_groups)
    return rest == 0 and torch.equal(groups, runs.repeat_interleave(length))
