"""NVFP4 in SGLang: cures of its faults while layers load, and Marlin's arithmetic for the CPU.

SGLang 0.5.23 multiplies a fused module by the largest `weight_scale_2` of its shards, and experts
by that of the gate, whatever scales the other shards' codes were made with
(modelopt_quant.py:2273, :2745). It orders a bias for Marlin's kernel, and then adds it itself, to
outputs that are in their own order (marlin_utils_fp4.py:205, :133). Experts run with activations in
FP4 on compute capability 10.0 and up, and scales of 1 where the checkpoint has none (:3120).

What a layer gets on CUDA is SGLang's own method; its `apply` is left alone.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.moe_runner import MoeRunner, MoeRunnerConfig
from sglang.srt.layers.moe.utils import MoeRunnerBackend, get_moe_runner_backend
from sglang.srt.layers.quantization import modelopt_quant
from sglang.srt.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead
from sglang.srt.utils.common import get_device_capability

from mixedprec_plugin.cpu.config import CpuConfig
from mixedprec_plugin.cpu.experts import LoopedExperts, Prepare, Product, Rows, check_experts, weigh
from mixedprec_plugin.cpu.fp4 import multiply, whole_scale
from mixedprec_plugin.cpu.linear import QuantizedLinear
from mixedprec_plugin.errors import Problem, ShapeError
from mixedprec_plugin.methods.construct import recast
from mixedprec_plugin.methods.nvfp4 import GROUP_SIZE, NAME
from mixedprec_plugin.quantize.fp4 import share_scale

UNSUMMED_EXPERTS = (modelopt_quant.ModelOptNvFp4FusedMoEMethod,)


def _cure_linear(method: Any) -> None:
    """Let a method of SGLang's give shards one scale of the whole, and leave biases in order."""
    create, process = method.create_weights, method.process_weights_after_loading

    def create_weights(layer: torch.nn.Module, *args: Any, **keywords: Any) -> None:
        create(layer, *args, **keywords)
        if method.quant_config.is_w4a16 and not _keeps_input_scale(method):
            # a placeholder that no kernel reads
            del layer.input_scale

    def process_weights_after_loading(layer: Any) -> None:
        share_scales(layer)
        bias = getattr(layer, "bias", None)
        layer.bias = None
        process(layer)
        if bias is not None and hasattr(layer, "workspace"):
            # as wide as Marlin's tiles, which outputs are added to
            padding = layer.weight.shape[1] // 2 - bias.shape[0]
            bias.data = torch.nn.functional.pad(bias.data, (0, padding))
        layer.bias = bias

    method.create_weights = create_weights
    method.process_weights_after_loading = process_weights_after_loading


def _cure_experts(method: Any) -> None:
    """Let a method of SGLang's give gate and up one scale, and run in Marlin's kernels.

    In others only where they are asked for, or a checkpoint's own config says so under `auto`.
    """
    create, process = method.create_weights, method.process_weights_after_loading
    run = method.create_moe_runner
    backend = get_moe_runner_backend()
    is_weight_only = method.quant_config.is_w4a16 or get_device_capability() < (10, 0)
    is_marlin = backend.is_marlin() or (backend.is_auto() and is_weight_only)

    def create_weights(layer: FusedMoE, *args: Any, **keywords: Any) -> None:
        create(layer, *args, **keywords)
        if is_marlin:
            drop_unused(layer, method)

    def create_moe_runner(layer: FusedMoE, moe_runner_config: MoeRunnerConfig) -> None:
        run(layer, moe_runner_config)
        if is_marlin and method._moe_runner_backend != MoeRunnerBackend.MARLIN:
            method._moe_runner_backend = MoeRunnerBackend.MARLIN
            method.runner = MoeRunner(MoeRunnerBackend.MARLIN, moe_runner_config)

    def process_weights_after_loading(layer: FusedMoE) -> None:
        share_expert_scales(layer)
        process(layer)

    method.create_weights, method.create_moe_runner = create_weights, create_moe_runner
    method.process_weights_after_loading = process_weights_after_loading


_CURES = {
    modelopt_quant.ModelOptNvFp4A16LinearMethod: _cure_linear,
    modelopt_quant.ModelOptFp4LinearMethod: _cure_linear,
    modelopt_quant.ModelOptNvFp4FusedMoEMethod: _cure_experts,
}


def _keeps_input_scale(method: Any) -> bool:
    return bool(getattr(method.quant_config, "keeps_input_scale", not method.quant_config.is_w4a16))


def cured(method: Any) -> Any:
    """A method of SGLang's, whose faults are cured where it is one of NVFP4's."""
    cure = _CURES.get(type(method))
    if cure is not None:
        cure(method)
    return method


def drop_unused(layer: FusedMoE, method: Any) -> None:
    """Take away parameters of experts that no checkpoint fills, and Marlin does not read."""
    unused = ["w13_blockscale_swizzled", "w2_blockscale_swizzled"]
    unused += [] if _keeps_input_scale(method) else ["w13_input_scale", "w2_input_scale"]
    for name in unused:
        delattr(layer, name)


def share_scales(layer: Any) -> None:
    """Give the shards of a layer one `weight_scale_2`; its elements are alike afterwards.

    Raises:
        ShapeError: the shards' scales cannot be told by one without rounding.
    """
    wholes = layer.weight_scale_2.data
    rows = list(layer.logical_widths)
    _share(layer.weight_scale.data, wholes, rows, getattr(layer, "prefix", ""))


def share_expert_scales(layer: FusedMoE) -> None:
    """Give gate and up of each expert one `w13_weight_scale_2`.

    Raises:
        ShapeError: as of `share_scales`.
    """
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
    parts: tuple[torch.Tensor, ...] = torch.split(scales, rows)
    for part, whole in zip(parts, wholes, strict=True):
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
    """`ModelOptFp4Config` of a serialized checkpoint whose layers are all quantized, weight-only.

    Args:
        keeps_input_scale: whether the checkpoint has input scales, which nothing computes with.
    """

    def __init__(self, keeps_input_scale: bool) -> None:
        super().__init__(
            is_checkpoint_nvfp4_serialized=True,
            group_size=GROUP_SIZE,
            exclude_modules=[],
            packed_modules_mapping={},
            use_per_token_activation=False,
        )
        self.is_w4a16, self.keeps_input_scale = True, keeps_input_scale


class CuredConfig(QuantizationConfig):
    """Makes a config of SGLang's one whose NVFP4 layers compute what their weights say."""

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """SGLang's own method, cured where it is one of NVFP4's; None for what is not quantized."""
        method: QuantizeMethodBase | None = cured(super().get_quant_method(layer, prefix))
        return method


class NvFp4Config(CuredConfig, SerializedConfig):
    """`ModelOptFp4Config` for layers that a preset names."""


# of checkpoints: all layers in NVFP4, some, and experts beside FP8
_REPAIRED = {
    theirs: type(f"Repaired{theirs.__name__}", (CuredConfig, theirs), {})
    for theirs in (
        modelopt_quant.ModelOptFp4Config,
        modelopt_quant.ModelOptMixedPrecisionConfig,
        modelopt_quant.HybridFp8NvFp4Config,
    )
}


def repaired(config: QuantizationConfig) -> QuantizationConfig:
    """The config whose layers share scales rightly; others, ours too, are returned as they are."""
    return recast(config, _REPAIRED)


class ModelOptNvFp4A16LinearMethod(QuantizedLinear, modelopt_quant.ModelOptNvFp4A16LinearMethod):
    """SGLang's `ModelOptNvFp4A16LinearMethod` with torch arithmetic."""

    def create_weights(self, layer: LinearBase, *args: Any, **kwargs: Any) -> None:
        """Create SGLang's parameters, but an "input_scale" that no checkpoint fills."""
        super().create_weights(layer, *args, **kwargs)
        if not _keeps_input_scale(self):
            del layer.input_scale

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Give the shards one scale; the parameters can be loaded again."""
        share_scales(layer)

    def multiply(self, layer: LinearBase, rows: torch.Tensor) -> torch.Tensor:
        product = multiply(rows, layer.weight.data, layer.weight_scale.data)
        return product.mul_(whole_scale(layer.weight_scale_2.data[0], rows.dtype))


class NvFp4HeadLinearMethod(ModelOptNvFp4A16LinearMethod):
    """The same for `lm_head`, where SGLang goes by the name (logits_processor.py:143)."""


class ModelOptNvFp4FusedMoEMethod(LoopedExperts, modelopt_quant.ModelOptNvFp4FusedMoEMethod):
    """SGLang's `ModelOptNvFp4FusedMoEMethod` with torch arithmetic."""

    preset_name = NAME

    def __init__(self, quant_config: SerializedConfig) -> None:
        # not SGLang's constructor, which asks for the card; as it has them for Marlin's kernels
        self.quant_config = quant_config
        self.enable_flashinfer_trtllm_moe = False
        self.use_flashinfer_trtllm_weight_layout = False

    def create_weights(self, layer: FusedMoE, *args: Any, **kwargs: Any) -> None:
        """Create SGLang's parameters, but for what only other kernels read."""
        check_experts(layer, self.preset_name, ("silu",), "block of inputs", (GROUP_SIZE,))
        modelopt_quant.ModelOptNvFp4FusedMoEMethod.create_weights(self, layer, *args, **kwargs)
        drop_unused(layer, self)

    def get_moe_runner_backend(self, layer: FusedMoE) -> MoeRunnerBackend:
        """Marlin, as on CUDA; for any other SGLang's router multiplies by the factor of routed
        experts, too (fused_moe_triton/layer.py:109), as models do without CUDA.
        """
        return MoeRunnerBackend.MARLIN

    def process_weights_after_loading(self, layer: FusedMoE) -> None:
        """Give gate and up one scale; the parameters can be loaded again."""
        share_expert_scales(layer)

    def prepare(self, layer: FusedMoE) -> tuple[Prepare, Prepare]:
        """Activations -> their products with gate and up weights, and with down weights."""
        wholes = layer.w13_weight_scale_2.data[:, 0], layer.w2_weight_scale_2.data
        return (
            partial(self._prepare, layer.w13_weight.data, layer.w13_weight_scale.data, wholes[0]),
            partial(self._prepare, layer.w2_weight.data, layer.w2_weight_scale.data, wholes[1]),
        )

    def _prepare(
        self, packed: torch.Tensor, scales: torch.Tensor, wholes: torch.Tensor, x: torch.Tensor
    ) -> Product:
        """Make ready activations [R, K], which are not quantized.

        The scale of the whole is multiplied by the router weight first, both of them rounded to the
        activation's dtype. On the first product Marlin has no router weight, and Triton's kernel
        multiplies in float32.
        """
        is_early = self.moe_runner_config.apply_router_weight_on_input

        def run(expert: int, rows: Rows, router_weights: torch.Tensor | None) -> torch.Tensor:
            product = multiply(x[rows], packed[expert], scales[expert])
            whole = whole_scale(wholes[expert], x.dtype)
            if router_weights is None or is_early:
                return weigh(product * whole, router_weights, x.dtype)
            return product * (whole * router_weights.to(x.dtype)).unsqueeze(1)

        return run


class CpuNvFp4Config(CpuConfig, SerializedConfig):
    """`ModelOptFp4Config` on the CPU."""

    methods = (ModelOptNvFp4A16LinearMethod, ModelOptNvFp4FusedMoEMethod)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The layer's method; None where the layer is none that is quantized.

        Experts are not given SGLang's method first: its constructor refuses CPUs.
        """
        if isinstance(layer, FusedMoE):
            return ModelOptNvFp4FusedMoEMethod(self)
        if isinstance(layer, ParallelLMHead):
            return NvFp4HeadLinearMethod(self)
        return super().get_quant_method(layer, prefix)
