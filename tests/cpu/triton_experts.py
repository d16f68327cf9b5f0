"""Runs SGLang's own fused MoE kernels in Triton's interpreter and stores what they return.

    TRITON_INTERPRET=1 python -m tests.cpu.triton_experts OUT.pt

A process of its own: the variable must be set before Triton is imported. The file holds, for every
call, the experts as stored, the inputs and the output. Around the kernels runs SGLang's
`_fused_moe_kernel_sequence`; three things of CUDA's that are no kernels of Triton's are put in
place: the alignment of slots to blocks, the quantizer per tensor, and silu, which CUDA keeps in
float32 until it is multiplied.
"""

from __future__ import annotations

import sys
from typing import Any
from unittest import mock

import torch

from tests.cpu.expert_layers import HIDDEN, load_experts, make_case, process, stored_experts
from tests.cpu.layers import Case
from tests.cpu.triton_interpreter import install

CASES = (
    None,
    Case("fp8", {"weight_block_size": None}),
    Case("fp8", {"weight_block_size": [128, 128]}),
    Case("fp8_channel", {}),
    Case("blockwise_int8", {"weight_block_size": [128, 128]}),
    Case("int8_channel", {}),
)
# tokens whose experts are given; -1 is masked
IDS = (
    [[3, 0, 4]],
    [[-1, 2, -1], [-1, -1, -1], [4, 0, 1], [3, -1, 0], [0, 1, 2], [2, 4, -1], [1, 3, 4]],
)


def tiles(case: Case | None, is_wide: bool) -> dict[str, int]:
    """Sizes of the kernel's tiles; wide ones are ragged at the edges of N, and of K where K may."""
    is_block = case is not None and case.arguments.get("weight_block_size") is not None
    return {
        "BLOCK_SIZE_M": 16,
        "BLOCK_SIZE_N": 512 if is_wide else 64,
        "BLOCK_SIZE_K": 256 if is_wide and not is_block else 128,
        "GROUP_SIZE_M": 1,
    }


def align(
    topk_ids: torch.Tensor, block_size: int, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `moe_align_block_size` returns, by its docstring; masked slots are the first bucket."""
    ids = topk_ids.reshape(-1)
    slots, experts = [], []
    for expert in range(-1, num_experts):
        own = (ids == expert).nonzero().flatten().tolist()
        padded = -(-len(own) // block_size) * block_size
        slots += own + [ids.numel()] * (padded - len(own))
        experts += [expert] * (padded // block_size)
    as_ints = (torch.tensor(values, dtype=torch.int32) for values in (slots, experts, [len(slots)]))
    sorted_ids, expert_ids, total = as_ints
    return sorted_ids, expert_ids, total


def quantize_tensor(
    x: torch.Tensor,
    scale: torch.Tensor | None = None,
    use_per_token_if_dynamic: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `scaled_fp8_quant` launches on CUDA (per_tensor_quant_fp8.cuh, per_token_quant_fp8.cuh).

    Both below kernels/jit/csrc/gemm.
    """
    if scale is None:
        magnitudes = x.float().abs()
        scale = (magnitudes.max() / 448).view(1)
        if use_per_token_if_dynamic:
            scale = magnitudes.amax(1, keepdim=True) / 448
    inverse = torch.where(scale == 0, 0, torch.ones(1) / scale)
    return (x.float() * inverse).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def silu(x: torch.Tensor) -> torch.Tensor:
    """The gate's function in float32."""
    x = x.float()
    return x * x.sigmoid()


def run(case: Case | None, x: torch.Tensor, topk: Any, on_input: bool) -> torch.Tensor:
    """One call of SGLang's kernels on a layer that SGLang's loaders filled."""
    from sglang.kernels.ops.moe import fused_moe_triton_kernels as kernels
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe

    layer = make_case(FusedMoE, case)
    load_experts(layer, stored_experts(case))
    process(layer)
    # SGLang's own method says what its kernels are given
    info = layer.quant_method.get_triton_quant_info(layer)
    w13_scale = info.w13_scale
    if w13_scale is not None and w13_scale.dim() == 2:
        # SGLang replaces the two equal scales of gate and up by one
        w13_scale = w13_scale[:, 0].contiguous()
    config = tiles(case, is_wide=on_input)
    slots, experts, total = align(topk.topk_ids, config["BLOCK_SIZE_M"], layer.num_experts)
    with (
        mock.patch.object(kernels, "scaled_fp8_quant", quantize_tensor),
        mock.patch.object(fused_moe.F, "silu", silu),
    ):
        out = fused_moe._fused_moe_kernel_sequence(
            x, info.w13_weight.data, info.w2_weight.data, topk.topk_weights, topk.topk_ids,
            slots, experts, total, config, None, False, False, b1=None, b2=None,
            use_fp8_w8a8=info.use_fp8_w8a8, use_int8_w8a8=info.use_int8_w8a8,
            use_int8_w8a16=False, use_int4_w4a16=False, per_channel_quant=info.per_channel_quant,
            w1_scale=w13_scale, w2_scale=info.w2_scale, w1_zp=None, w2_zp=None,
            a1_scale=None, a2_scale=None, block_shape=info.block_shape, activation="silu",
            is_gated=True, no_combine=True, no_combine_keep_router_weight=True, inplace=False,
            apply_router_weight_on_input=on_input, routed_scaling_factor=None, gemm1_alpha=None,
            gemm1_limit=None, filter_expert=False,
        )  # fmt: skip
    result: torch.Tensor = out
    return result


def main(path: str) -> None:
    """Run every call and write the file: case -> calls of (input, weights, ids, early, output)."""
    install()
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    from tests.cpu.context import publish

    publish()
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[tuple[Any, ...]]] = {}
    for case in CASES:
        for ids in IDS:
            for on_input in (False, True):
                x = torch.randn(len(ids), HIDDEN, generator=generator).bfloat16()
                weights = torch.rand(len(ids), len(ids[0]), generator=generator)
                chosen = torch.tensor(ids, dtype=torch.int32)
                topk = StandardTopKOutput(weights, chosen, torch.zeros(len(ids), 5))
                out = run(case, x, topk, on_input)
                found.setdefault(str(case), []).append((x, weights, chosen, on_input, out))
    torch.save(found, path)


if __name__ == "__main__":
    main(sys.argv[1])
