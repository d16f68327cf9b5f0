"""MXFP4 experts in SGLang: its own method, made to run in Marlin, and Marlin's arithmetic.

SGLang 0.5.23 runs them in Marlin only where --moe-runner-backend marlin is given, which other
methods do not take; else it dequantizes them to 16 bits while it loads (mxfp4.py:1116). In Marlin
it pads hidden sizes to 256, for which its loader of single experts has no place (layer.py:864),
though Marlin needs 64, and the inner features of a rank to 128, which repacking pads by itself
(marlin_utils_fp4.py:367). It gives every layer biases. Marlin's runner leaves the factor of routed
experts to the router, which is not told so (fused_marlin_moe.py:418, layer.py:109).

What a layer gets on CUDA is SGLang's own method; its `apply` is left alone.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.moe_runner import MoeRunner, MoeRunnerConfig
from sglang.srt.layers.moe.token_dispatcher.standard import (
    StandardCombineInput,
    StandardDispatchOutput,
)
from sglang.srt.layers.moe.utils import MoeRunnerBackend
from sglang.srt.layers.quantization import mxfp4
from sglang.srt.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from mixedprec_plugin.cpu.experts import (
    LoopedExperts,
    Prepare,
    Product,
    Rows,
    check_experts,
    expert_biases,
)
from mixedprec_plugin.cpu.fp4 import multiply
from mixedprec_plugin.errors import MethodError, Problem
from mixedprec_plugin.methods.mxfp4 import GROUP_SIZE, NAME
from mixedprec_plugin.quantize.fp4 import E8M0

UNSUMMED_EXPERTS = (mxfp4.Mxfp4MoEMethod,)


def _create_weights(method: Any, create: Any, layer: FusedMoE, *args: Any, **keys: Any) -> None:
    """Create SGLang's parameters in the checkpoint's own sizes, as it has them for DeepGEMM."""
    if layer.moe_runner_config.apply_router_weight_on_input:
        what = "SGLang's MXFP4 experts do not compute the router weight on the input"
        remedy = "give the experts another method"
        raise MethodError(Problem(layer.layer_name, what, remedy, rule="experts-form"))
    is_marlin, method.use_marlin, method.use_deep_gemm = method.use_marlin, False, True
    create(layer, *args, **keys)
    method.use_marlin, method.use_deep_gemm = is_marlin, False
    if not layer.with_bias:
        del layer.w13_weight_bias, layer.w2_weight_bias


def run_in_marlin(method: Any) -> Any:
    """Let a method of SGLang's be what it is with --moe-runner-backend marlin."""
    method.use_marlin = True
    method.fuse_routed_scaling_factor_in_topk = True
    create_runner = method.create_moe_runner

    def create_moe_runner(layer: FusedMoE, moe_runner_config: MoeRunnerConfig) -> None:
        create_runner(layer, moe_runner_config)
        method.runner = MoeRunner(MoeRunnerBackend.MARLIN, moe_runner_config)

    method.create_weights = partial(_create_weights, method, method.create_weights)
    method.create_moe_runner = create_moe_runner
    return method


class SerializedConfig(mxfp4.Mxfp4Config):
    """`Mxfp4Config` of a checkpoint whose experts are in MXFP4."""

    def __init__(self) -> None:
        super().__init__(is_checkpoint_mxfp4_serialized=True)


class Mxfp4ExpertsConfig(SerializedConfig):
    """Gives experts SGLang's own method, in Marlin."""

    @classmethod
    def get_min_capability(cls) -> int:
        """That of Marlin's kernels for it (mxfp4.py:655)."""
        return 90

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """SGLang's own method for experts; None for everything else."""
        if not isinstance(layer, FusedMoE):
            return None
        method: QuantizeMethodBase = run_in_marlin(super().get_quant_method(layer, prefix))
        return method


def repaired(config: QuantizationConfig) -> QuantizationConfig:
    """The config whose experts run in Marlin; others, ours too, are returned as they are."""
    is_serialized = type(config) is mxfp4.Mxfp4Config and config.is_static_cfg()
    return Mxfp4ExpertsConfig() if is_serialized else config


class Mxfp4MoEMethod(LoopedExperts, mxfp4.Mxfp4MoEMethod):
    """SGLang's `Mxfp4MoEMethod` with torch arithmetic."""

    preset_name = NAME

    def create_weights(self, layer: FusedMoE, *args: Any, **kwargs: Any) -> None:
        """Create SGLang's parameters; refuse what the CPU platform or Marlin does not run."""
        unit = "block of inputs", (GROUP_SIZE,)
        check_experts(layer, self.preset_name, ("silu",), *unit, has_biases=True)
        create = partial(mxfp4.Mxfp4MoEMethod.create_weights, self)
        _create_weights(self, create, layer, *args, **kwargs)

    def apply(
        self, layer: FusedMoE, dispatch_output: StandardDispatchOutput
    ) -> StandardCombineInput:
        """Run the experts in bfloat16 whatever the model's dtype is, as SGLang's runner does."""
        x = dispatch_output.hidden_states
        own = dispatch_output._replace(hidden_states=x.bfloat16())
        out = super().apply(layer, own).hidden_states
        return StandardCombineInput(hidden_states=out.to(x.dtype))

    def prepare(self, layer: FusedMoE) -> tuple[Prepare, Prepare]:
        """Activations -> their products with gate and up weights, and with down weights."""
        gate_up, down = layer.w13_weight_scale.data, layer.w2_weight_scale.data
        biases = expert_biases(layer)
        return (
            partial(_prepare, layer.w13_weight.data, gate_up.view(E8M0), biases[0]),
            partial(_prepare, layer.w2_weight.data, down.view(E8M0), biases[1]),
        )


def _prepare(
    packed: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor | None, x: torch.Tensor
) -> Product:
    """Make ready activations [R, K], which are not quantized.

    A product is rounded, its sum with the bias is, and the router weight before it multiplies it.
    Source: kernels/jit/csrc/gemm/marlin_moe/marlin_template.h:1616, 1640.
    """

    def run(expert: int, rows: Rows, router_weights: torch.Tensor | None) -> torch.Tensor:
        product = multiply(x[rows], packed[expert], scales[expert], 1.0)
        if biases is not None:
            product += biases[expert]
        if router_weights is None:
            return product
        return product.mul_(router_weights.to(x.dtype).unsqueeze(1))

    return run


class CpuMxfp4Config(SerializedConfig):
    """`Mxfp4Config` on the CPU."""

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of experts; None for everything else."""
        return Mxfp4MoEMethod(prefix) if isinstance(layer, FusedMoE) else None
