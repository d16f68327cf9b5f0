"""humming in SGLang: a cure of its bias on CUDA, and its arithmetic on the CPU platform.

SGLang 0.5.23 lets the kernel add a layer's bias (layers/quantization/humming.py:953, :976), and so
every rank of a row-parallel layer adds it, and a layer that leaves it to its caller, who adds it
again. The compiler that humming-kernels starts does not look for a library of its own where pip put
it. Its way to quantize while it loads calls humming-kernels 0.1.12 with an argument that is not
there (:751, `has_global_scale`); what is stored in codes, as all that a preset names is, goes
another way.

The kernel multiplies by (q - 2**(bits-1)) * scale, rounded to the activation's dtype, and adds the
bias after the sum is rounded (humming-kernels, include/humming/arith/mainloop_arith.cuh:210,
epilogue_arith.cuh:168).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from sglang.srt.layers.linear import LinearBase, RowParallelLinear, get_group_rank_size
from sglang.srt.layers.quantization import humming
from sglang.srt.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from mixedprec_plugin.cpu.config import CpuConfig
from mixedprec_plugin.cpu.linear import QuantizedLinear
from mixedprec_plugin.cpu.packed import dequantize, multiply
from mixedprec_plugin.methods.construct import cuda_capability, recast
from mixedprec_plugin.methods.humming import BF16_CAPABILITY
from mixedprec_plugin.quantize.chunks import row_chunks
from mixedprec_plugin.quantize.packing import unpack


def find_compiler() -> None:
    """Let humming's compiler, a process of its own, find what lies beside NVRTC's library.

    It loads NVRTC by its path, and NVRTC the other by its name, `libnvrtc-builtins`.
    """
    from humming.utils.nvrtc import get_nvrtc_library_path

    folder = str(Path(get_nvrtc_library_path()).parent)
    known = os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    if folder not in known:
        os.environ["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, [*known, folder]))


def _cure(method: QuantizeMethodBase) -> None:
    """Let a method of SGLang's add a bias where its layer does, and nowhere else."""
    process = method.process_weights_after_loading

    def process_weights_after_loading(layer: Any) -> None:
        is_split = isinstance(layer, RowParallelLinear)
        if layer.skip_bias_add or (is_split and get_group_rank_size(layer.tp_group)[0] > 0):
            layer.with_bias = False
        process(layer)

    method.process_weights_after_loading = process_weights_after_loading


class HummingConfig(humming.HummingConfig):
    """SGLang's `HummingConfig` whose layers add a bias once; their methods are SGLang's own."""

    def __init__(self, full_config: dict[str, Any] | None = None) -> None:
        super().__init__(full_config)
        find_compiler()

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Those that the first forward does not refuse (humming/kernel/humming.py:378)."""
        capability = cuda_capability()
        has_bf16 = capability is None or capability >= BF16_CAPABILITY
        return [torch.bfloat16, torch.half] if has_bf16 else [torch.half]

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """SGLang's own method, cured; None for what is not quantized."""
        method: QuantizeMethodBase | None = super().get_quant_method(layer, prefix)
        if type(method) is humming.HummingLinearMethod:
            _cure(method)
        return method


def repaired(config: QuantizationConfig) -> QuantizationConfig:
    """The config whose layers add a bias once; others, ours too, are returned as they are."""
    return recast(config, {humming.HummingConfig: HummingConfig})


class HummingLinearMethod(QuantizedLinear, humming.HummingLinearMethod):
    """SGLang's `HummingLinearMethod` with torch arithmetic."""

    def multiply(self, layer: LinearBase, rows: torch.Tensor) -> torch.Tensor:
        words, scales = layer.weight.data, layer.weight_scale.data
        bits = int(self.weight_schema.b_dtype.num_bits)
        out = rows.new_empty((rows.shape[0], words.shape[0]))
        for part in row_chunks(words.shape[0], rows.shape[1]):
            codes = unpack(words[part], bits)
            out[:, part] = multiply(rows, dequantize(codes, 1 << (bits - 1), scales[part].t()))
        return out


class CpuHummingConfig(CpuConfig, humming.HummingConfig):
    """`HummingConfig` on the CPU."""

    methods = (HummingLinearMethod,)

    def __init__(self, full_config: dict[str, Any] | None = None) -> None:
        # humming-kernels would start two processes to build what only a GPU runs
        os.environ.setdefault("HUMMING_DISABLE_PARALLEL_BUILD", "1")
        super().__init__(full_config)
