"""FP8 on the CPU platform: SGLang's weights and loaders, CUDA's arithmetic in torch."""

from __future__ import annotations

from functools import partial

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.quantization import fp8
from sglang.srt.layers.quantization.utils import convert_to_channelwise, per_tensor_dequantize

from mixedprec_plugin.cpu.activation import (
    FP8_MAX,
    quantize_fp8_groups,
    quantize_fp8_static,
    quantize_fp8_tokens,
)
from mixedprec_plugin.cpu.config import CpuConfig
from mixedprec_plugin.cpu.experts import LoopedExperts, Prepare, prepare_blocks, prepare_channels
from mixedprec_plugin.cpu.linear import QuantizedLinear, multiply_blocks, multiply_channels
from mixedprec_plugin.errors import MethodError, Problem

UNSUMMED_EXPERTS = (fp8.Fp8MoEMethod,)


class Fp8LinearMethod(QuantizedLinear, fp8.Fp8LinearMethod):
    """SGLang's `Fp8LinearMethod` with torch arithmetic, per tensor and per block."""

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Leave the parameters as they were loaded, so that they can be loaded again.

        Per tensor, every shard's scale is spread over the shard's channels; nothing is
        requantized, as on NVIDIA (fp8.py:1201).
        """
        if self.block_quant:
            return
        layer.channel_scales = convert_to_channelwise(layer.weight_scale.data, layer.logical_widths)
        static = layer.input_scale is not None
        layer.token_scale = layer.input_scale.data.max() if static else None

    def multiply(self, layer: LinearBase, rows: torch.Tensor) -> torch.Tensor:
        if self.block_quant:
            block_size = self.quant_config.weight_block_size
            return multiply_blocks(layer, quantize_fp8_groups, block_size, rows)
        scale = layer.token_scale
        quantize = quantize_fp8_tokens if scale is None else partial(_quantize_static, scale)
        return multiply_channels(layer, quantize, layer.channel_scales, rows)


class Fp8MoEMethod(LoopedExperts, fp8.Fp8MoEMethod):
    """SGLang's `Fp8MoEMethod` with torch arithmetic, per tensor and per block."""

    preset_name = "fp8"

    def block_size(self) -> tuple[int, int] | None:
        """The block, (BN, BK), that shares a scale; None without blocks."""
        return tuple(self.weight_block_size) if self.block_quant else None

    def process_weights_after_loading(self, layer: FusedMoE) -> None:
        """Give gate and up projection of every expert one scale, the greater, as CUDA does.

        Blocks stay as they were loaded. Per tensor the parameters keep their shapes, so that they
        can be loaded again.
        """
        if self.block_quant:
            return
        scales = layer.w13_weight_scale.data
        for expert in range(layer.num_local_experts):
            _unify_scales(layer.w13_weight.data[expert], scales[expert])
        is_static = layer.w13_input_scale is not None
        # one scale for all experts of the layer (fp8.py:2666)
        layer.gate_up_scale = layer.w13_input_scale.data.max() if is_static else None
        layer.down_scale = layer.w2_input_scale.data.max() if is_static else None

    def prepare(self, layer: FusedMoE) -> tuple[Prepare, Prepare]:
        if block_size := self.block_size():
            return prepare_blocks(layer, quantize_fp8_groups, block_size)
        return (
            _prepare(layer.w13_weight.data, layer.w13_weight_scale.data[:, 0], layer.gate_up_scale),
            _prepare(layer.w2_weight.data, layer.w2_weight_scale.data, layer.down_scale),
        )


class CpuFp8Config(CpuConfig, fp8.Fp8Config):
    """`Fp8Config` on the CPU: per tensor, and per block through `weight_block_size`."""

    methods = (Fp8LinearMethod, Fp8MoEMethod)

    def check_form(self, where: str) -> None:
        """Refuse what would run, and compute something else than CUDA does."""
        unsupported = {
            "weights that are not stored in FP8": not self.is_checkpoint_fp8_serialized,
            "MXFP8": self.use_mxfp8,
            "FP4 experts": self.is_fp4_experts,
            "power-of-two activation scales (scale_fmt='ue8m0')": self.scale_fmt == "ue8m0",
        }
        found = [name for name, present in unsupported.items() if present]
        if found:
            what = f"the CPU platform does not run fp8 with {', '.join(found)}"
            raise MethodError(Problem(where, what, "give the layer another method"))


def quantize_fp8_tensor(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize activations to e4m3 with one scale for all tokens.

    Args:
        x: [T, K], floating point.
    Returns:
        codes float8_e4m3fn [T, K]; scale float32 [1, 1]. Zeros alone have codes and scale 0.
    Source:
        kernels/jit/csrc/gemm/per_tensor_quant_fp8.cuh: scale = amax / 448, x * fl(1/scale).
    """
    amax = x.abs().amax().float() if x.numel() else torch.zeros(())
    scale = (amax / FP8_MAX).view(1, 1)
    if not scale:
        return torch.zeros(x.shape).to(torch.float8_e4m3fn), scale
    return quantize_fp8_static(x, scale), scale


def _quantize_static(
    scale: torch.Tensor, rows: torch.Tensor, _greatest: object
) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_fp8_static(rows, scale), scale


def _prepare(
    weights: torch.Tensor, scales: torch.Tensor, input_scale: torch.Tensor | None
) -> Prepare:
    """Quantize by the checkpoint's scale, or one for all rows; weights [E, N, K], scales [E]."""

    def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if input_scale is None:
            codes, scale = quantize_fp8_tensor(x)
        else:
            codes, scale = quantize_fp8_static(x, input_scale), input_scale
        return codes, scale.expand(x.shape[0], 1)

    channels = scales.view(-1, 1, 1).expand(-1, weights.shape[1], 1)
    return partial(prepare_channels, quantize, weights, channels)


def _unify_scales(weight: torch.Tensor, scales: torch.Tensor) -> None:
    """Requantize gate and up projection [2 I, K] to the greater of scales [2], in place.

    Also where they are equal: CUDA takes every weight through float16 (fp8.py:2708).
    """
    greatest = scales.max().clone()
    for half, scale in zip(weight.chunk(2), scales.clone(), strict=True):
        half.copy_(quantize_fp8_static(per_tensor_dequantize(half, scale), greatest))
    scales.fill_(greatest)
