"""INT8 in blocks on the CPU platform: SGLang's weights and loaders, CUDA's arithmetic in torch."""

from __future__ import annotations

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.quantization import blockwise_int8

from mixedprec_plugin.cpu.activation import quantize_int8_groups
from mixedprec_plugin.cpu.config import CpuConfig
from mixedprec_plugin.cpu.experts import LoopedExperts, Prepare, prepare_blocks
from mixedprec_plugin.cpu.linear import QuantizedLinear, multiply_blocks

UNSUMMED_EXPERTS = (blockwise_int8.BlockInt8MoEMethod,)


class BlockInt8LinearMethod(QuantizedLinear, blockwise_int8.BlockInt8LinearMethod):
    """SGLang's `BlockInt8LinearMethod` with torch arithmetic."""

    def multiply(self, layer: LinearBase, rows: torch.Tensor) -> torch.Tensor:
        block_size = self.quant_config.weight_block_size
        return multiply_blocks(layer, quantize_int8_groups, block_size, rows)


class BlockInt8MoEMethod(LoopedExperts, blockwise_int8.BlockInt8MoEMethod):
    """SGLang's `BlockInt8MoEMethod` with torch arithmetic."""

    preset_name = "blockwise_int8"

    def block_size(self) -> tuple[int, int]:
        block_n, block_k = self.quant_config.weight_block_size
        return block_n, block_k

    def prepare(self, layer: FusedMoE) -> tuple[Prepare, Prepare]:
        return prepare_blocks(layer, quantize_int8_groups, self.block_size())


class CpuBlockInt8Config(CpuConfig, blockwise_int8.BlockInt8Config):
    """`BlockInt8Config` on the CPU."""

    methods = (BlockInt8LinearMethod, BlockInt8MoEMethod)
