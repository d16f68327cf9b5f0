"""AWQ: a cure of SGLang's Marlin experts on CUDA, and its arithmetic on the CPU platform."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
from sglang.srt.layers.quantization.awq import AWQConfig, AWQMarlinConfig, awq
from sglang.srt.layers.quantization.awq.schemes import AWQLinearScheme, AWQMoEScheme
from sglang.srt.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from sglang.srt.layers.quantization.moe_wna16 import MoeWNA16Method
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead

from mixedprec_plugin.cpu.packed_layers import (
    PackedConfig,
    PackedExperts,
    PackedLinear,
    PackedScheme,
    ReloadableMethod,
    Stored,
)
from mixedprec_plugin.errors import Problem, ShapeError
from mixedprec_plugin.methods.construct import recast
from mixedprec_plugin.methods.marlin_experts import ScalesInOrder
from mixedprec_plugin.quantize.packing import AWQ_PACK_FACTOR, pack_awq, unpack_awq

# the latter where Marlin does not take the experts (awq.py:388)
UNSUMMED_EXPERTS = (awq.AWQMoEMethod, MoeWNA16Method)


class RepairedAWQMoEScheme(ScalesInOrder, AWQMoEScheme):
    """SGLang's scheme; only the order of the repacked scales is repaired."""


class AWQExpertsConfig(AWQMarlinConfig):
    """`AWQMarlinConfig` whose experts have their scales in order.

    The method that a layer gets is SGLang's own `AWQMoEMethod`.
    """

    def get_moe_scheme(self, layer: torch.nn.Module) -> RepairedAWQMoEScheme:
        return RepairedAWQMoEScheme(self)


def repaired(config: QuantizationConfig) -> QuantizationConfig:
    """The config whose experts are repaired; others, ours among them, are returned as they are."""
    return recast(config, {AWQMarlinConfig: AWQExpertsConfig})


def asked_of_model(config: QuantizationConfig) -> Mapping[str, Any]:
    """AWQ's layers in Marlin ask the model's config for their type (marlin_utils.py:634)."""
    return {"quant_type": config.quant_type} if isinstance(config, AWQMarlinConfig) else {}


class _Words(PackedScheme):
    """Nibbles in AWQ's order along N, int32 [K, N/8]."""

    def read(self, words: torch.Tensor, rows: slice) -> torch.Tensor:
        return unpack_awq(words[:, rows.start // AWQ_PACK_FACTOR : rows.stop // AWQ_PACK_FACTOR])

    def write(self, codes: torch.Tensor) -> torch.Tensor:
        return pack_awq(codes).contiguous()

    def zero_points(self, stored: Stored) -> torch.Tensor:
        return unpack_awq(stored["qzeros"])


class CpuAWQLinearScheme(_Words, PackedLinear, AWQLinearScheme):
    """SGLang's `AWQLinearScheme` with torch matmuls in the activation's dtype."""

    def create_weights(
        self, layer: LinearBase, input_size_per_partition: int, *args: Any, **kwargs: Any
    ) -> None:
        """Create SGLang's parameters; a group size of -1 becomes the layer's own K.

        Not where K is split over ranks: every rank would need the scales of the whole, which
        SGLang's AWQ parameters cannot hold.
        """
        if self.quant_config.group_size == -1:
            input_size = kwargs.get("input_size", input_size_per_partition)
            if input_size != input_size_per_partition:
                what = (
                    f"AWQ group size -1 with K = {input_size} split over ranks "
                    f"(expected a group size that divides {input_size_per_partition})"
                )
                raise ShapeError(Problem("", what, "use group size 128, or tensor parallel 1"))
            self.quant_config = copy.copy(self.quant_config)
            self.quant_config.group_size = input_size
        super().create_weights(layer, input_size_per_partition, *args, **kwargs)


class CpuAWQMoEScheme(_Words, PackedExperts, AWQMoEScheme):
    """SGLang's `AWQMoEScheme`, the one that `AWQMarlinConfig` gives, with torch matmuls."""

    preset_name = "awq"


class AWQLinearMethod(ReloadableMethod, awq.AWQLinearMethod):
    """SGLang's `AWQLinearMethod`, which can be loaded a second time."""


class AWQMoEMethod(ReloadableMethod, awq.AWQMoEMethod):
    """SGLang's `AWQMoEMethod`, which can be loaded a second time."""


class CpuAWQConfig(PackedConfig, AWQConfig):
    """`AWQConfig` on the CPU; runs bfloat16 too, as `AWQMarlinConfig` does on CUDA."""

    methods = (AWQLinearMethod, AWQMoEMethod)
    schemes = (CpuAWQLinearScheme, CpuAWQMoEScheme)

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Experts and heads are served as by `AWQMarlinConfig`; `AWQConfig` leaves them alone."""
        if isinstance(layer, ParallelLMHead):
            layer.scheme = self.get_linear_scheme(layer)
            return AWQLinearMethod(self)
        if not isinstance(layer, FusedMoE):
            return super().get_quant_method(layer, prefix)
        if awq.is_layer_skipped_awq(prefix, self.modules_to_not_convert):
            return None
        layer.scheme = self.get_moe_scheme(layer)
        return AWQMoEMethod(self)
