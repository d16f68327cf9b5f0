"""Stands in for what a whole model has beside its layers: norms and attention."""

from __future__ import annotations

from typing import Any

import torch

from tests.dryrun.journal import JOURNAL


def install() -> None:
    """Stand in for the kernels of a whole model that are no part of the question."""
    import sgl_kernel.elementwise
    import sglang.srt.models.registry  # noqa: F401  (not among fake tensors)
    from sglang.srt.layers.radix_attention import RadixAttention

    sgl_kernel.elementwise._flashinfer_norm = _Norms()
    RadixAttention.forward = _attention


class _Norms:
    """flashinfer.norm, which compiles at its first use."""

    def rmsnorm(
        self, states: torch.Tensor, weight: torch.Tensor, *_rest: Any, **_keywords: Any
    ) -> torch.Tensor:
        """Normed states."""
        assert states.shape[-1] == weight.shape[0]
        JOURNAL.launch("flashinfer", "rmsnorm")
        return torch.empty_like(states)

    def fused_add_rmsnorm(
        self, states: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *_rest: Any
    ) -> None:
        """In place."""
        assert states.shape == residual.shape
        assert states.shape[-1] == weight.shape[0]
        JOURNAL.launch("flashinfer", "fused_add_rmsnorm")


def _attention(
    layer: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *_rest: Any,
    q_rope: torch.Tensor | None = None,
    **_keywords: Any,
) -> torch.Tensor:
    """[T, heads * head_dim], of latent attention [T, heads * rank]."""
    num_tokens, heads = q.shape[0], layer.tp_q_head_num
    assert num_tokens == k.shape[0] == v.shape[0]
    width = q.numel() // num_tokens + (0 if q_rope is None else q_rope.numel() // num_tokens)
    assert width == heads * layer.qk_head_dim, (q.shape, heads, layer.qk_head_dim)
    JOURNAL.launch("attention", "radix")
    return q.new_empty(num_tokens, heads * layer.v_head_dim)
