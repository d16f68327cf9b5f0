"""Unquantized experts on the CPU platform that take masked ids, for groups of a composite layer.

A layer whose experts are all unquantized keeps SGLang's own method, unless its gate is scaled as
gpt-oss's: SGLang's has the rows of gate and up in turn on a CPU (fused_moe_native.py:134).
"""

from __future__ import annotations

from functools import partial

import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.quantization import unquant
from torch.nn.functional import linear

from mixedprec_plugin.cpu.experts import (
    LoopedExperts,
    Prepare,
    Product,
    Rows,
    expert_biases,
    weighed,
)


class UnquantizedFusedMoEMethod(LoopedExperts, unquant.UnquantizedFusedMoEMethod):
    """SGLang's `UnquantizedFusedMoEMethod` with an expert loop that takes masked ids."""

    preset_name = "bf16"
    has_biases = True

    def prepare(self, layer: FusedMoE) -> tuple[Prepare, Prepare]:
        gate_up, down = expert_biases(layer)
        return (
            partial(_prepare, layer.w13_weight.data, gate_up),
            partial(_prepare, layer.w2_weight.data, down),
        )


UNSUMMED_EXPERTS = (unquant.UnquantizedFusedMoEMethod,)
CPU_EXPERTS = UnquantizedFusedMoEMethod


def _prepare(weights: torch.Tensor, biases: torch.Tensor | None, x: torch.Tensor) -> Product:
    """[R, K], weights [E, N, K], biases [E, N], which Triton's kernel adds before it rounds."""

    def multiply(expert: int, rows: Rows) -> torch.Tensor:
        product = _multiply(x[rows], weights[expert])
        return product if biases is None else product + biases[expert].float()

    return weighed(multiply, x.dtype)


def _multiply(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[t, N], in float32 where that is as fast as rounding it once more before the router weight.

    Without AVX-512 torch multiplies 16-bit matrices one by one; see `cpu.packed.multiply`.
    """
    if rows.shape[0] > 1 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return linear(rows.float(), weight.float())
    return linear(rows, weight).float()
