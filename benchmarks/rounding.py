"""A transformers Llama in bf16 that rounds its residual stream where SGLang's kernels do.

transformers rounds the sum of a residual before it normalizes it, and the normalized value before
it multiplies by the norm's weight. SGLang's fused_add_rmsnorm rounds once, at the end. All else
stays transformers' own.
"""

from __future__ import annotations

from typing import Any

import torch


class KernelNorm(torch.nn.Module):
    """RMSNorm rounded once.

    Args:
        norm: transformers' norm: `weight` and `variance_epsilon` are read.
    """

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight: torch.Tensor = norm.weight
        self.epsilon: float = norm.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize [..., H] of any floating dtype: [..., H] in the dtype of the weight."""
        x = x.float()
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return (x * scale * self.weight).to(self.weight.dtype)


class KernelDecoderLayer(torch.nn.Module):
    """A decoder layer that takes and returns the residual's sum in float32, not rounded yet.

    Args:
        layer: transformers' LlamaDecoderLayer, whose attention and MLP are used as they are.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.attention, self.mlp = layer.self_attn, layer.mlp
        self.before_attention = KernelNorm(layer.input_layernorm)
        self.before_mlp = KernelNorm(layer.post_attention_layernorm)

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """[B, T, H] to [B, T, H] float32; the arguments go to the attention."""
        dtype: torch.dtype = self.before_mlp.weight.dtype
        attended, _ = self.attention(
            hidden_states=self.before_attention(hidden_states), **arguments
        )
        total: torch.Tensor = hidden_states.to(dtype).float() + attended.float()
        out: torch.Tensor = self.mlp(self.before_mlp(total))
        return total.to(dtype).float() + out.float()


def round_as_kernels(model: Any) -> None:
    """Change a LlamaForCausalLM in place; its other modules stay."""
    layers = model.model.layers
    for index, layer in enumerate(layers):
        layers[index] = KernelDecoderLayer(layer)
    model.model.norm = KernelNorm(model.model.norm)
