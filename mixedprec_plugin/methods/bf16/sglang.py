"""Unquantized experts on the CPU platform that take masked ids, for groups of a composite layer.

A layer whose experts are all unquantized keeps SGLang's own method.
"""

from __future__ import annotations

from functools import partial

import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.quantization import unquant
from torch.nn.functional import linear

from mixedprec_plugin.cpu.experts import LoopedExperts, Prepare, Product, Rows, weighed


class UnquantizedFusedMoEMethod(LoopedExperts, unquant.UnquantizedFusedMoEMethod):
    """SGLang's `UnquantizedFusedMoEMethod` with an expert loop that takes masked ids."""

    preset_name = "bf16"

    def prepare(self, layer: FusedMoE) -> tuple[Prepare, Prepare]:
        return partial(_prepare, layer.w13_weight.data), partial(_prepare, layer.w2_weight.data)


UNSUMMED_EXPERTS = (unquant.UnquantizedFusedMoEMethod,)
CPU_EXPERTS = UnquantizedFusedMoEMethod


def _prepare(weights: torch.Tensor, x: torch.Tensor) -> Product:
    """[R, K], weights [E, N, K]."""

    def multiply(expert: int, rows: Rows) -> torch.Tensor:
        return _multiply(x[rows], weights[expert])

    return weighed(multiply, x.dtype)


def _multiply(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[t, N], in float32 where that is as fast as rounding it once more before the router weight.

    Without AVX-512 torch multiplies 16-bit matrices one by one; see `cpu.packed.multiply`.
    """
    if rows.shape[0] > 1 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return linear(rows.float(), weight.float())
    return linear(rows, weight).float()
