"""GPTQ: cures of SGLang's Marlin experts, and its arithmetic on the CPU platform.

As of SGLang 0.5.23 (layers/quantization/gptq/schemes/gptq_moe.py), on CUDA and on the CPU:

- :236, :245  scales are float16 whatever the model runs in, and the kernel asserts that they are
  of the activation's dtype (fused_moe_triton/fused_marlin_moe.py:233): no bfloat16 model runs.
- :198  without act order the down projection's scales get the groups of all ranks on every rank:
  the loader fills 1/tp of them, and the kernel finds a wrong group size.
- :290, :300  two parameters of sort indices, which no checkpoint holds, look like empty weights.

And the order of the gate and up projections' scales, see `ScalesInOrder`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.quantization.gptq import GPTQMarlinConfig, gptq
from sglang.srt.layers.quantization.gptq.schemes import (
    GPTQMarlinLinearScheme,
    GPTQMarlinMoEScheme,
)

from mixedprec_plugin.cpu.packed_layers import (
    PackedConfig,
    PackedExperts,
    PackedLinear,
    PackedScheme,
    ReloadableMethod,
    Stored,
)
from mixedprec_plugin.errors import MethodError, Problem
from mixedprec_plugin.methods.marlin_experts import ScalesInOrder
from mixedprec_plugin.quantize.packing import pack, unpack

UNSUMMED_EXPERTS = (gptq.GPTQMarlinMoEMethod,)


class _RepairedParameters(GPTQMarlinMoEScheme):
    """SGLang's scheme; the parameters that it creates are repaired."""

    def create_weights(
        self, layer: FusedMoE, *args: Any, params_dtype: torch.dtype, **kwargs: Any
    ) -> None:
        """Create the parameters.

        Raises:
            MethodError: the layer needs what Marlin's experts do not compute.
        """
        _check_marlin_experts(layer, self.quant_config)
        super().create_weights(layer, *args, params_dtype=params_dtype, **kwargs)
        _repair_parameters(layer, self.quant_config, params_dtype)


class RepairedGPTQMarlinMoEScheme(ScalesInOrder, _RepairedParameters):
    """SGLang's scheme; the parameters that it creates and the order of its scales are repaired."""


class GPTQExpertsConfig(GPTQMarlinConfig):
    """`GPTQMarlinConfig` whose experts have the repaired parameters.

    The method that a layer gets is SGLang's own `GPTQMarlinMoEMethod`.
    """

    def get_moe_scheme(self, layer: FusedMoE) -> RepairedGPTQMarlinMoEScheme:
        """The scheme that `GPTQMarlinMoEMethod` runs."""
        return RepairedGPTQMarlinMoEScheme(self)


def repaired(config: QuantizationConfig) -> QuantizationConfig:
    """The config whose experts are repaired; others, ours among them, are returned as they are."""
    if type(config) is not GPTQMarlinConfig:
        return config
    own = copy.copy(config)
    own.__class__ = GPTQExpertsConfig
    return own


def _repair_parameters(
    layer: FusedMoE, config: GPTQMarlinConfig, params_dtype: torch.dtype
) -> None:
    """Give the parameters that SGLang just created the dtype and shape that its kernels want."""
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


def _check_marlin_experts(layer: FusedMoE, config: GPTQMarlinConfig) -> None:
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


class _Words(PackedScheme):
    """Codes along K, int32 [K/(32/bits), N].

    Marlin's zero point is fixed, 2**(bits - 1): the `qzeros` are loaded and not read.
    """

    def read(self, words: torch.Tensor, rows: slice) -> torch.Tensor:
        """Codes of some rows, uint8 [rows, K], out of the words of one weight."""
        return unpack(words[:, rows].t(), self.quant_config.weight_bits)

    def write(self, codes: torch.Tensor) -> torch.Tensor:
        """Undo `read` for all rows."""
        return pack(codes, self.quant_config.weight_bits).t().contiguous()

    def zero_points(self, stored: Stored) -> int:
        """One for all."""
        return int(2 ** (self.quant_config.weight_bits - 1))


class CpuGPTQLinearScheme(_Words, PackedLinear, GPTQMarlinLinearScheme):
    """SGLang's `GPTQMarlinLinearScheme` with torch matmuls in the activation's dtype."""


class CpuGPTQMoEScheme(_Words, PackedExperts, _RepairedParameters):
    """SGLang's `GPTQMarlinMoEScheme`, repaired, with torch matmuls in the activation's dtype."""

    preset_name = "gptq"

    def unit(self) -> tuple[str, tuple[int]]:
        """What must divide the sizes of an expert: its name, and how many elements it is."""
        if self.quant_config.group_size == -1:
            return "pack factor", (self.quant_config.pack_factor,)
        return super().unit()


class GPTQMarlinLinearMethod(ReloadableMethod, gptq.GPTQMarlinLinearMethod):
    """SGLang's `GPTQMarlinLinearMethod`, which can be loaded a second time."""


class GPTQMarlinMoEMethod(ReloadableMethod, gptq.GPTQMarlinMoEMethod):
    """SGLang's `GPTQMarlinMoEMethod`, which can be loaded a second time."""


class CpuGPTQConfig(PackedConfig, GPTQMarlinConfig):
    """`GPTQMarlinConfig` on the CPU: symmetric, 4 and 8 bits, with and without act order."""

    methods = (GPTQMarlinLinearMethod, GPTQMarlinMoEMethod)
    schemes = (CpuGPTQLinearScheme, CpuGPTQMoEScheme)
