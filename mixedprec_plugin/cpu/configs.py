"""SGLang's quantization configs with methods for linear layers and experts on a plain CPU.

Each takes its parent's constructor arguments and decides as its parent does; only the method that
it hands out differs.
"""

from __future__ import annotations

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
from sglang.srt.layers.quantization import blockwise_int8, fp8, w8a8_fp8
from sglang.srt.layers.quantization.awq import AWQConfig, awq
from sglang.srt.layers.quantization.base_config import QuantizeMethodBase
from sglang.srt.layers.quantization.blockwise_int8 import BlockInt8Config
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.layers.quantization.gptq import GPTQMarlinConfig, gptq

from mixedprec_plugin.cpu.awq_experts import AWQMoEMethod, CpuAWQMoEScheme
from mixedprec_plugin.cpu.awq_linear import AWQLinearMethod, CpuAWQLinearScheme
from mixedprec_plugin.cpu.fp8_channel_experts import W8A8FP8MoEMethod
from mixedprec_plugin.cpu.fp8_channel_linear import W8A8Fp8LinearMethod
from mixedprec_plugin.cpu.fp8_experts import Fp8MoEMethod
from mixedprec_plugin.cpu.fp8_linear import Fp8LinearMethod
from mixedprec_plugin.cpu.gptq_experts import CpuGPTQMoEScheme, GPTQMarlinMoEMethod
from mixedprec_plugin.cpu.gptq_linear import CpuGPTQLinearScheme, GPTQMarlinLinearMethod
from mixedprec_plugin.cpu.int8_experts import BlockInt8MoEMethod
from mixedprec_plugin.cpu.int8_linear import BlockInt8LinearMethod
from mixedprec_plugin.errors import MethodError, Problem
from mixedprec_plugin.serving.fp8_channel import ChannelFp8Config


class CpuFp8Config(Fp8Config):
    """`Fp8Config` on the CPU: per tensor, and per block through `weight_block_size`."""

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The layer's method; None where the layer is none that is quantized.

        Raises:
            MethodError: the config asks for a form of FP8 that the CPU does not run.
        """
        if not isinstance(layer, LinearBase | FusedMoE):
            return None
        method = super().get_quant_method(layer, prefix)
        if not isinstance(method, fp8.Fp8LinearMethod | fp8.Fp8MoEMethod):
            return method
        self._check_form(prefix)
        return Fp8MoEMethod(self) if isinstance(layer, FusedMoE) else Fp8LinearMethod(self)

    def _check_form(self, prefix: str) -> None:
        """Refuse what would run, and compute something else than CUDA does."""
        unsupported = {
            "weights that are not stored in FP8": not self.is_checkpoint_fp8_serialized,
            "MXFP8": self.use_mxfp8,
            "FP4 experts": self.is_fp4_experts,
            "power-of-two activation scales (scale_fmt='ue8m0')": self.scale_fmt == "ue8m0",
        }
        found = [name for name, present in unsupported.items() if present]
        if found:
            raise MethodError(
                Problem(
                    where=prefix,
                    what=f"the CPU platform does not run fp8 with {', '.join(found)}",
                    remedy="give the layer another method",
                )
            )


class CpuChannelFp8Config(ChannelFp8Config):
    """`W8A8Fp8Config` on the CPU."""

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The layer's method; None where the layer is none that is quantized."""
        method = super().get_quant_method(layer, prefix)
        if isinstance(method, w8a8_fp8.W8A8FP8MoEMethod):
            return W8A8FP8MoEMethod(self)
        is_quantized = isinstance(method, w8a8_fp8.W8A8Fp8LinearMethod)
        return W8A8Fp8LinearMethod(self) if is_quantized else method


class CpuBlockInt8Config(BlockInt8Config):
    """`BlockInt8Config` on the CPU."""

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The layer's method; None where the layer is none that is quantized."""
        method = super().get_quant_method(layer, prefix)
        if isinstance(method, blockwise_int8.BlockInt8MoEMethod):
            return BlockInt8MoEMethod(self)
        is_quantized = isinstance(method, blockwise_int8.BlockInt8LinearMethod)
        return BlockInt8LinearMethod(self) if is_quantized else method


class CpuAWQConfig(AWQConfig):
    """`AWQConfig` on the CPU; runs bfloat16 too, as `AWQMarlinConfig` does on CUDA."""

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Dtypes that a model may run in."""
        return [torch.float16, torch.bfloat16]

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The layer's method; None where the layer is none that is quantized.

        Experts are served, as by `AWQMarlinConfig`: `AWQConfig` would leave them unquantized.
        """
        if isinstance(layer, FusedMoE):
            if awq.is_layer_skipped_awq(prefix, self.modules_to_not_convert):
                return None
            layer.scheme = self.get_moe_scheme(layer)
            return AWQMoEMethod(self)
        method = super().get_quant_method(layer, prefix)
        return AWQLinearMethod(self) if isinstance(method, awq.AWQLinearMethod) else method

    def get_linear_scheme(self, layer: torch.nn.Module) -> CpuAWQLinearScheme:
        """The scheme that `AWQLinearMethod` runs."""
        return CpuAWQLinearScheme(self)

    def get_moe_scheme(self, layer: torch.nn.Module) -> CpuAWQMoEScheme:
        """The scheme that `AWQMoEMethod` runs."""
        return CpuAWQMoEScheme(self)


class CpuGPTQConfig(GPTQMarlinConfig):
    """`GPTQMarlinConfig` on the CPU: symmetric, 4 and 8 bits, with and without act order."""

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The layer's method; None where the layer is none that is quantized."""
        method = super().get_quant_method(layer, prefix)
        if isinstance(method, gptq.GPTQMarlinMoEMethod):
            return GPTQMarlinMoEMethod(self)
        if not isinstance(method, gptq.GPTQMarlinLinearMethod):
            return method
        # Not self: the parent gives every layer a copy, changed where `dynamic` says so.
        return GPTQMarlinLinearMethod(method.quant_config)

    def get_linear_scheme(self, layer: torch.nn.Module) -> CpuGPTQLinearScheme:
        """The scheme that `GPTQMarlinLinearMethod` runs."""
        return CpuGPTQLinearScheme(self)

    def get_moe_scheme(self, layer: torch.nn.Module) -> CpuGPTQMoEScheme:
        """The scheme that `GPTQMarlinMoEMethod` runs."""
        return CpuGPTQMoEScheme(self)
