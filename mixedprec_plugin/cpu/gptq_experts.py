"""GPTQ experts on the CPU: SGLang's weights and loaders, torch matmuls."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig
from sglang.srt.layers.moe.token_dispatcher.standard import (
    StandardCombineInput,
    StandardDispatchOutput,
)
from sglang.srt.layers.quantization.gptq import GPTQMarlinConfig, gptq
from sglang.srt.layers.quantization.gptq.schemes import GPTQMarlinMoEScheme

from mixedprec_plugin.cpu.expert_checks import check_form, check_multiple
from mixedprec_plugin.cpu.experts import run_layer
from mixedprec_plugin.cpu.heap import trim_heap
from mixedprec_plugin.cpu.int4 import Int4Weight, unpack_int4
from mixedprec_plugin.cpu.int8 import Int8Weight
from mixedprec_plugin.cpu.packed_experts import PackedWeight, pack_experts, prepare_weight_only
from mixedprec_plugin.cpu.weight_only import multiply
from mixedprec_plugin.experts.gptq import check_marlin_experts, repair_parameters
from mixedprec_plugin.quantize.packing import pack, unpack

_PARTS = ("w13", "w2")


class GPTQMarlinMoEMethod(gptq.GPTQMarlinMoEMethod):
    """SGLang's `GPTQMarlinMoEMethod`, which can be loaded a second time."""

    def restore_weights_before_loading(self, layer: FusedMoE) -> None:
        """Give the parameters the checkpoint's layout again; their values stay."""
        layer.scheme.restore_weights_before_loading(layer)


class CpuGPTQMoEScheme(GPTQMarlinMoEScheme):
    """SGLang's `GPTQMarlinMoEScheme` with torch matmuls in the activation's dtype.

    Marlin's zero point is fixed, 2**(bits - 1): the `qzeros` are loaded and not read.
    """

    quant_config: GPTQMarlinConfig

    def __init__(self, quant_config: GPTQMarlinConfig) -> None:
        # Not the parent's constructor: its kernel object is for a GPU.
        self.quant_config = quant_config
        self.kernel = SimpleNamespace()
        self._weights: dict[str, list[PackedWeight] | None] = {}
        self._orders: dict[str, list[torch.Tensor]] = {}

    def create_weights(
        self, layer: FusedMoE, *args: Any, params_dtype: torch.dtype, **kwargs: Any
    ) -> None:
        """Create SGLang's parameters, repaired.

        Raises:
            MethodError, ShapeError: what the CPU platform does not run, or Marlin does not.
        """
        config = self.quant_config
        check_form(layer, "gptq", ("silu",))
        check_marlin_experts(layer, config)
        whole = config.group_size == -1
        unit = config.pack_factor if whole else config.group_size
        check_multiple(layer, "gptq", unit, "pack factor" if whole else "group size")
        super().create_weights(layer, *args, params_dtype=params_dtype, **kwargs)
        repair_parameters(layer, config, params_dtype)

    def create_moe_runner(self, layer: FusedMoE, moe_runner_config: MoeRunnerConfig) -> None:
        """Keep the config: the loop of `experts.py` needs no runner."""
        self.moe_runner_config = moe_runner_config

    def get_moe_runner_backend(self, layer: FusedMoE) -> None:
        """None: SGLang's name for a method that runs without one of its runners."""

    def process_weights_after_loading(self, layer: FusedMoE) -> None:
        """Replace the words by a layout that is fast here, where groups are runs of K.

        With act order the columns are sorted by group, and the activations as they come.
        """
        for part in _PARTS:
            if self._weights.get(part) is None:
                self._weights[part] = self._pack(layer, part)
        trim_heap()

    def restore_weights_before_loading(self, layer: FusedMoE) -> None:
        """Give the words GPTQ's layout again; does nothing where they have it."""
        for part, weights in self._weights.items():
            if weights is None:
                continue
            words = []
            for expert, weight in enumerate(weights):
                if isinstance(weight, Int4Weight):
                    codes = unpack_int4(weight.packed)
                else:
                    codes = weight.unpack()
                if self._orders:
                    codes = codes[:, self._orders[part][expert].argsort()]
                words.append(pack(codes, self.quant_config.weight_bits).t().contiguous())
            getattr(layer, f"{part}_qweight").data = torch.stack(words)
        self._weights.clear()

    def apply_weights(
        self, layer: FusedMoE, dispatch_output: StandardDispatchOutput
    ) -> StandardCombineInput:
        """Run the experts, [T, H] -> [T, H]."""
        gate_up, down = (
            partial(prepare_weight_only, partial(self._multiply, layer, part), False)
            for part in _PARTS
        )
        return run_layer(layer, dispatch_output, self.moe_runner_config, gate_up, down)

    def _pack(self, layer: FusedMoE, part: str) -> list[PackedWeight] | None:
        bits = self.quant_config.weight_bits
        qweight, scales = getattr(layer, f"{part}_qweight"), getattr(layer, f"{part}_scales")
        if self.quant_config.desc_act:
            groups = getattr(layer, f"{part}_g_idx").data
            if not all(_is_even(own, scales.shape[1]) for own in groups):
                return None
            self._orders[part] = list(groups.argsort(dim=1, stable=True))

        def pack_one(expert: int) -> PackedWeight | None:
            codes = unpack(qweight.data[expert].t(), bits)
            if self.quant_config.desc_act:
                codes = codes[:, self._orders[part][expert]]
            if bits == 4:
                return Int4Weight.pack(codes, scales.data[expert], 8)
            return Int8Weight.pack(codes, scales.data[expert])

        return pack_experts(qweight, scales, pack_one)

    def _multiply(
        self, layer: FusedMoE, part: str, expert: int, rows: torch.Tensor
    ) -> torch.Tensor:
        """[t, K] -> [t, N]."""
        weights = self._weights[part]
        if weights is None:
            return multiply(rows, self._dequantize(layer, part, expert))
        if self._orders:
            rows = rows[:, self._orders[part][expert]]
        return weights[expert].multiply(rows)

    def _dequantize(self, layer: FusedMoE, part: str, expert: int) -> torch.Tensor:
        """The weight [N, K] from the checkpoint's layout."""
        bits = self.quant_config.weight_bits
        qweight, scales = (
            getattr(layer, f"{part}_{suffix}").data[expert] for suffix in ("qweight", "scales")
        )
        steps = unpack(qweight.t(), bits).to(scales.dtype).sub_(2 ** (bits - 1))
        if self.quant_config.desc_act:
            return steps.mul_(scales[getattr(layer, f"{part}_g_idx").data[expert]].t())
        grouped = steps.view(steps.shape[0], scales.shape[0], -1)
        return grouped.mul_(scales.t().unsqueeze(2)).view(steps.shape)


def _is_even(groups: torch.Tensor, num_groups: int) -> bool:
    """Whether all groups of [K] have equally many columns."""
    length, rest = divmod(groups.numel(), num_groups)
    counts = torch.bincount(groups, minlength=num_groups)
    return rest == 0 and bool((counts == length).all())
