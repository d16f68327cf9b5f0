"""FP8 experts on the CPU: SGLang's weights and loaders, CUDA's arithmetic in torch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig
from sglang.srt.layers.moe.token_dispatcher.standard import (
    StandardCombineInput,
    StandardDispatchOutput,
)
from sglang.srt.layers.quantization import fp8
from sglang.srt.layers.quantization.utils import per_tensor_dequantize

from mixedprec_plugin.cpu.activation import FP8_MAX, quantize_fp8_groups, quantize_fp8_static
from mixedprec_plugin.cpu.block_experts import prepare_blocks
from mixedprec_plugin.cpu.channel_matmul import channel_matmul
from mixedprec_plugin.cpu.expert_checks import check_form, check_multiple
from mixedprec_plugin.cpu.experts import ACTIVATIONS, Product, Rows, run_layer, weigh


class Fp8MoEMethod(fp8.Fp8MoEMethod):
    """SGLang's `Fp8MoEMethod` with torch arithmetic, per tensor and per block."""

    def create_weights(self, layer: FusedMoE, *args: Any, **kwargs: Any) -> None:
        """Create SGLang's parameters.

        Raises:
            MethodError, ShapeError: what the CPU platform does not run.
        """
        check_form(layer, "fp8", ACTIVATIONS)
        if self.block_quant:
            for unit in self.weight_block_size:
                check_multiple(layer, "fp8", unit, "block size")
        super().create_weights(layer, *args, **kwargs)

    def create_moe_runner(self, layer: FusedMoE, moe_runner_config: MoeRunnerConfig) -> None:
        """Keep the config: the loop of `experts.py` needs no runner."""
        self.moe_runner_config = moe_runner_config

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

    def apply(
        self, layer: FusedMoE, dispatch_output: StandardDispatchOutput
    ) -> StandardCombineInput:
        """Run the experts, [T, H] -> [T, H]."""
        if self.block_quant:
            prepare = partial(prepare_blocks, quantize_fp8_groups, tuple(self.weight_block_size))
            gate_up = partial(prepare, layer.w13_weight.data, layer.w13_weight_scale_inv.data)
            down = partial(prepare, layer.w2_weight.data, layer.w2_weight_scale_inv.data)
        else:
            gate_up = partial(
                _prepare_tensor,
                layer.w13_weight.data,
                layer.w13_weight_scale.data[:, 0],
                layer.gate_up_scale,
            )
            down = partial(
                _prepare_tensor,
                layer.w2_weight.data,
                layer.w2_weight_scale.data,
                layer.down_scale,
            )
        return run_layer(layer, dispatch_output, self.moe_runner_config, gate_up, down)


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


def _prepare_tensor(
    weights: torch.Tensor, scales: torch.Tensor, input_scale: torch.Tensor | None, x: torch.Tensor
) -> Product:
    """Quantize [R, K] with the checkpoint's scale or one for all; weights [E, N, K], scales [E]."""
    if input_scale is None:
        codes, scale = quantize_fp8_tensor(x)
    else:
        codes, scale = quantize_fp8_static(x, input_scale), input_scale

    def multiply(expert: int, rows: Rows, router_weights: torch.Tensor | None) -> torch.Tensor:
        weight = weights[expert]
        channels = scales[expert].expand(weight.shape[0], 1)
        product = channel_matmul(codes[rows], scale, weight, channels, torch.float32)
        return weigh(product, router_weights, x.dtype)

    return multiply


def _unify_scales(weight: torch.Tensor, scales: torch.Tensor) -> None:
    """Requantize gate and up projection [2 I, K] to the greater of scales [2], in place.

    Also where they are equal: CUDA takes every weight through float16 (fp8.py:2708).
    """
    greatest = scales.max().clone()
    for half, scale in zip(weight.chunk(2), scales.clone(), strict=True):
        half.copy_(quantize_fp8_static(per_tensor_dequantize(half, scale), greatest))
    scales.fill_(greatest)
