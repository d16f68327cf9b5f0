"""Experts of a transformers Mixtral, each with the weights of its own scheme.

transformers keeps all experts of a layer in one parameter, which holds one dtype; here each expert
is three linear layers, and the sum over a token's experts is taken as SGLang's kernels take it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

_PLACE = re.compile(r"(?P<layer>.*)\.block_sparse_moe\.experts\.(?P<expert>\d+)\.(?P<name>w[123])")


class ReferenceExperts(torch.nn.Module):
    """The experts of one layer.

    Source of the roundings: SGLang's fused_moe_kernel multiplies an expert's down projection by
    the router's weight in float32 and rounds once; moe_sum adds a token's experts in float32.

    Args:
        experts: what transformers built; its activation function is used.
    """

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.activation: Callable[[torch.Tensor], torch.Tensor] = experts.act_fn
        self.projections = torch.nn.ModuleList(
            torch.nn.ModuleDict() for _ in range(experts.num_experts)
        )

    def put(self, expert: int, name: str, module: torch.nn.Module) -> None:
        """Set one projection: `w1` gate, `w3` up, `w2` down."""
        projections: Any = self.projections[expert]
        projections[name] = module

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[T, H], ids [T, k] and weights [T, k] to [T, H] in the dtype of the input."""
        dtype = hidden_states.dtype
        total = torch.zeros(hidden_states.shape, dtype=torch.float32)
        for expert, projections in enumerate(self.projections):
            tokens, places = torch.where(top_k_index == expert)
            if not len(tokens):
                continue
            x = hidden_states[tokens]
            parts: Any = projections
            inner = self.activation(parts["w1"](x).float()).to(dtype) * parts["w3"](x)
            out = parts["w2"](inner).float() * top_k_weights[tokens, places, None].float()
            total.index_add_(0, tokens, out.to(dtype).float())
        return total.to(dtype)


def expert_place(layer_name: str) -> tuple[str, int, str] | None:
    """`model.layers.3.block_sparse_moe.experts.1.w2` -> its layer, expert and projection."""
    match = _PLACE.fullmatch(layer_name)
    return (match["layer"], int(match["expert"]), match["name"]) if match else None


def split_experts(model: Any) -> dict[str, ReferenceExperts]:
    """Replace the experts of every layer of a MixtralForCausalLM, in place.

    Returns:
        decoder layer's name -> its experts, whose projections are still to be put.
    """
    made = {}
    for index, layer in enumerate(model.model.layers):
        layer.mlp.experts = made[f"model.layers.{index}"] = ReferenceExperts(layer.mlp.experts)
    return made
