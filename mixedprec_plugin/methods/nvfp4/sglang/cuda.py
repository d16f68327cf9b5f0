"""NVFP4: cures of SGLang's faults; the CPU platform's arithmetic is in `cpu`.

SGLang 0.5.23 multiplies a fused module by the largest `weight_scale_2` of its shards, and experts
by that of the gate, whatever scales the other shards' codes were made with
(modelopt_quant.py:2273, :2745). It orders a bias for Marlin's kernel, and then adds it itself, to
outputs that are in their own order (marlin_utils_fp4.py:205, :133).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.moe_runner import MoeRunner, MoeRunnerConfig
from sglang.srt.layers.moe.utils import MoeRunnerBackend, get_moe_runner_backend
from sglang.srt.layers.quantization import modelopt_quant
from sglang.srt.layers.quantization.base_config import (
    LinearMethodBase,
    QuantizationConfig,
    QuantizeMethodBase,
)
from sglang.srt.utils.common import get_device_capability

from mixedprec_plugin.errors import Problem, ShapeError
from mixedprec_plugin.methods.nvfp4 import GROUP_SIZE
from mixedprec_plugin.quantize.fp4 import share_scale

_MARLIN = MoeRunnerBackend.MARLIN


class CuredLinear(LinearMethodBase):
    """Gives the shards of a fused module one scale of the whole, and adds biases in their order.

    The method's class has the name of SGLang's: linear layers choose their weight loader by it.
    """

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Repack the layer for its kernel; a bias stays as it is.

        Raises:
            ShapeError: the shards' scales cannot be told by one without rounding.
        """
        share_scales(layer)
        bias = getattr(layer, "bias", None)
        layer.bias = None
        super().process_weights_after_loading(layer)
        layer.bias = bias

    def apply(
        self, layer: LinearBase, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[..., K] -> [..., N]; the bias [N] is added to the rounded product."""
        out: torch.Tensor = super().apply(layer, x, None)
        return out if bias is None else out + bias


class ModelOptNvFp4A16LinearMethod(CuredLinear, modelopt_quant.ModelOptNvFp4A16LinearMethod):
    """SGLang's `ModelOptNvFp4A16LinearMethod`; activations stay in 16 bits."""

    def create_weights(self, layer: LinearBase, *args: Any, **kwargs: Any) -> None:
        """Create SGLang's parameters but "input_scale", which no kernel reads."""
        super().create_weights(layer, *args, **kwargs)
        del layer.input_scale


class ModelOptFp4LinearMethod(CuredLinear, modelopt_quant.ModelOptFp4LinearMethod):
    """SGLang's `ModelOptFp4LinearMethod`; activations in FP4, where the GPU has such arithmetic."""


class ModelOptNvFp4FusedMoEMethod(modelopt_quant.ModelOptNvFp4FusedMoEMethod):
    """SGLang's `ModelOptNvFp4FusedMoEMethod`; in Marlin's kernels where it is weight-only.

    By itself it quantizes activations to FP4 on compute capability 10.0 and up, with scales of 1
    where the checkpoint has none. The name has to have "ModelOpt" in it: SGLang's loader for
    experts looks for that (moe/fused_moe_triton/layer.py:1457).
    """

    _moe_runner_backend: Any

    @property
    def is_marlin(self) -> bool:
        """Whether no other kernels than Marlin's are asked for, or made for the GPU."""
        backend = get_moe_runner_backend()
        is_weight_only = self.quant_config.is_w4a16 or get_device_capability() < (10, 0)
        return bool(backend.is_marlin() or (backend.is_auto() and is_weight_only))

    def create_weights(self, layer: FusedMoE, *args: Any, **kwargs: Any) -> None:
        """Create SGLang's parameters, for Marlin without those that only other kernels read."""
        super().create_weights(layer, *args, **kwargs)
        if self.is_marlin:
            drop_unused(layer, self.quant_config)

    def create_moe_runner(self, layer: FusedMoE, moe_runner_config: MoeRunnerConfig) -> None:
        """Make the runner of Marlin's kernels, or of those that SGLang chooses."""
        super().create_moe_runner(layer, moe_runner_config)
        if self.is_marlin and self._moe_runner_backend != _MARLIN:
            self._moe_runner_backend = _MARLIN
            self.runner = MoeRunner(_MARLIN, moe_runner_config)

    def process_weights_after_loading(self, layer: FusedMoE) -> None:
        """Repack the experts for their kernel.

        Raises:
            ShapeError: the scales of gate and up cannot be told by one without rounding.
        """
        share_expert_scales(layer)
        super().process_weights_after_loading(layer)


_CURED = {
    getattr(modelopt_quant, own.__name__): own
    for own in (
        ModelOptNvFp4A16LinearMethod,
        ModelOptFp4LinearMethod,
        ModelOptNvFp4FusedMoEMethod,
    )
}
UNSUMMED_EXPERTS = (modelopt_quant.ModelOptNvFp4FusedMoEMethod,)


def drop_unused(layer: FusedMoE, config: modelopt_quant.ModelOptFp4Config) -> None:
    """Take away parameters of experts that no checkpoint fills, and Marlin does not read."""
    unused = ["w13_blockscale_swizzled", "w2_blockscale_swizzled"]
    unused += ["w13_input_scale", "w2_input_scale"] if config.is_w4a16 else []
    for name in unused:
        delattr(layer, name)


def share_scales(layer: LinearBase) -> None:
    """Give the shards of a layer one `weight_scale_2`; its elements are alike afterwards."""
    wholes = layer.weight_scale_2.data
    rows = list(layer.logical_widths)
    _share(layer.weight_scale.data, wholes, rows, getattr(layer, "prefix", ""))


def share_expert_scales(layer: FusedMoE) -> None:
    """Give gate and up of each expert one `w13_weight_scale_2`."""
    wholes = layer.w13_weight_scale_2.data
    if wholes.dim() != 2:
        return
    scales = layer.w13_weight_scale.data
    rows = [scales.shape[1] // 2] * 2
    for expert, own in enumerate(scales):
        _share(own, wholes[expert], rows, f"{layer.layer_name}, expert {expert}")


def _share(scales: torch.Tensor, wholes: torch.Tensor, rows: list[int], where: str) -> None:
    """Rewrite the e4m3 scales [N, K/16] of shards of so many rows, and their scales [S]."""
    largest = wholes.max()
    if bool((wholes == largest).all()):
        return
    for part, whole in zip(torch.split(scales, rows), wholes, strict=True):
        shared = share_scale(part, whole, largest)
        if shared is None:
            what = (
                f"its shards have a weight_scale_2 of {wholes.tolist()}, SGLang multiplies all by "
                "the largest, and their block scales are no e4m3 numbers beside that"
            )
            remedy = "take all shards from one source, or write method: bf16 to dequantize them"
            raise ShapeError(Problem(where, what, remedy, "shared-scale"))
        part.copy_(shared)
    wholes.fill_(largest)


class SerializedConfig(modelopt_quant.ModelOptFp4Config):
    """`ModelOptFp4Config` of a serialized checkpoint whose layers are all quantized.

    Args:
        is_w4a16: whether activations stay in 16 bits.
    """

    def __init__(self, is_w4a16: bool) -> None:
        super().__init__(
            is_checkpoint_nvfp4_serialized=True,
            group_size=GROUP_SIZE,
            exclude_modules=[],
            packed_modules_mapping={},
            use_per_token_activation=False,
        )
        self.is_w4a16 = is_w4a16


class NvFp4Config(SerializedConfig):
    """The same, whose layers compute what their weights say."""

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """SGLang's own method, cured; None where the layer is none that is quantized."""
        return cured(super().get_quant_method(layer, prefix))


class RepairedConfig(modelopt_quant.ModelOptFp4Config):
    """A checkpoint's own `ModelOptFp4Config`, whose layers compute what their weights say."""

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """SGLang's own method, cured where it is one of NVFP4's."""
        return cured(super().get_quant_method(layer, prefix))


def cured(method: Any) -> QuantizeMethodBase | None:
    """A method of SGLang's for NVFP4 with its faults cured; others as they are."""
    own = _CURED.get(type(method))
    made: QuantizeMethodBase | None = method if own is None else own(method.quant_config)
    return made


def repaired(config: QuantizationConfig) -> QuantizationConfig:
    """The config whose layers share scales rightly; others, ours too, are returned as they are."""
    if type(config) is not modelopt_quant.ModelOptFp4Config:
        return config
    own = copy.copy(config)
    own.__class__ = RepairedConfig
    return own
