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

from typing import Any

import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.quantization.gptq import GPTQMarlinConfig, gptq
from sglang.srt.layers.quantization.gptq.schemes import GPTQMarlinLinearScheme, GPTQMarlinMoEScheme

from mixedprec_plugin.cpu.packed_layers import (
    PackedConfig,
    PackedExperts,
    PackedLinear,
    PackedScheme,
    ReloadableMethod,
    Stored,
)
from mixedprec_plugin.errors import MethodError, Problem
from mixedprec_plugin.methods.construct import recast
from mixedprec_plugin.methods.marlin_experts import ScalesInOrder
from mixedprec_plugin.quantize.packing import pack, unpack

UNSUMMED_EXPERTS = (gptq.GPTQMarlinMoEMethod,)


class _RepairedParameters(GPTQMarlinMoEScheme):
    """SGLang's scheme; the parameters that it creates are repaired."""

    def create_weights(
        self, layer: FusedMoE, *args: Any, params_dtype: torch.dtype, **kwargs: Any
    ) -> None:
        """Create the parameters; refuse what Marlin's experts do not compute."""
        config, ranks = self.quant_config, layer.moe_tp_size
        unserved = {
            # a rank has the scales of its own columns and needs all
            f"act order (desc_act) over {ranks} ranks": config.desc_act and ranks > 1,
            # Marlin ignores it
            "the router weight on the input": layer.moe_runner_config.apply_router_weight_on_input,
        }
        if found := [text for text, is_asked in unserved.items() if is_asked]:
            what = f"SGLang's GPTQ experts do not compute {', '.join(found)}"
            remedy = "give the experts another method"
            raise MethodError(Problem(layer.layer_name, what, remedy, rule="experts-form"))
        super().create_weights(layer, *args, params_dtype=params_dtype, **kwargs)
        for part in ("w13_", "w2_"):
            scales = getattr(layer, f"{part}scales")
            scales.data = scales.data.to(params_dtype)
            indices = getattr(layer, f"{part}g_idx_sort_indices")
            indices.data = indices.data[:, :0].clone()
        if config.group_size != -1:
            num_groups = layer.intermediate_size_per_partition // config.group_size
            for parameter in (layer.w2_scales, layer.w2_qzeros):
                parameter.data = parameter.data[:, :num_groups].clone()


class RepairedGPTQMarlinMoEScheme(ScalesInOrder, _RepairedParameters):
    """SGLang's scheme; the parameters that it creates and the order of its scales are repaired."""


class GPTQExpertsConfig(GPTQMarlinConfig):
    """`GPTQMarlinConfig` whose experts have the repaired parameters.

    The method that a layer gets is SGLang's own `GPTQMarlinMoEMethod`.
    """

    def get_moe_scheme(self, layer: FusedMoE) -> RepairedGPTQMarlinMoEScheme:
        return RepairedGPTQMarlinMoEScheme(self)


def repaired(config: QuantizationConfig) -> QuantizationConfig:
    """The config whose experts are repaired; others, ours among them, are returned as they are."""
    return recast(config, {GPTQMarlinConfig: GPTQExpertsConfig})


class _Words(PackedScheme):
    """Codes along K, int32 [K/(32/bits), N].

    Marlin's zero point is fixed, 2**(bits - 1): the `qzeros` are loaded and not read.
    """

    def read(self, words: torch.Tensor, rows: slice) -> torch.Tensor:
        return unpack(words[:, rows].t(), self.quant_config.weight_bits)

    def write(self, codes: torch.Tensor) -> torch.Tensor:
        return pack(codes, self.quant_config.weight_bits).t().contiguous()

    def zero_points(self, stored: Stored) -> int:
        return int(2 ** (self.quant_config.weight_bits - 1))


class CpuGPTQLinearScheme(_Words, PackedLinear, GPTQMarlinLinearScheme):
    """SGLang's `GPTQMarlinLinearScheme` with torch matmuls in the activation's dtype."""


class CpuGPTQMoEScheme(_Words, PackedExperts, _RepairedParameters):
    """SGLang's `GPTQMarlinMoEScheme`, repaired, with torch matmuls in the activation's dtype."""

    preset_name = "gptq"

    def unit(self) -> tuple[str, tuple[int]]:
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
