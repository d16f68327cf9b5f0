"""What SGLang's models call that a plain CPU has not; the hooks are listed in serving/hooks.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def get_rope_wrapper(
    original: Callable[..., Any],
    *args: Any,
    rope_scaling: Mapping[str, Any] | None = None,
    device: str | None = None,
    **kwargs: Any,
) -> Any:
    """Make the rotary embedding of an MLA block without scaling as on every other device.

    On a CPU SGLang makes it for an AMX kernel, and knows only YaRN there.
    """
    if rope_scaling is None and device == "cpu":
        device = None
    return original(*args, rope_scaling=rope_scaling, device=device, **kwargs)


def launch_fused_gate_sigmoid_mul(
    original: Callable[..., None],
    hidden_states: torch.Tensor,
    gate_weight: torch.Tensor,
    shared_output: torch.Tensor,
    output: torch.Tensor,
    *,
    do_add: bool,
) -> None:
    """Gate the output of Qwen2-MoE's shared expert as the Triton kernel does, in float32.

    Args:
        hidden_states: [T, H].
        gate_weight: [H].
        shared_output: [T, H].
        output: [T, H], written; added to where `do_add`.
    """
    gate = (hidden_states.float() * gate_weight.float()).sum(-1, keepdim=True).sigmoid()
    gated = gate * shared_output.float()
    output.copy_(gated + output.float() if do_add else gated)


def get_attention_handler(
    original: Callable[..., Any], registry: type, backend_name: str
) -> Callable[..., Any]:
    """Have MLA blocks absorb `kv_b_proj` on SGLang's plainest attention, which reads the latent KV.

    SGLang takes it for its Triton backend, whose prefill expands keys and values of the new tokens.
    """
    if backend_name != "torch_native":
        handler: Callable[..., Any] = original(registry, backend_name)
        return handler
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import (
        AttnForwardMethod,
    )

    return lambda *_: AttnForwardMethod.MLA
