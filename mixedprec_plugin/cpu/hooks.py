"""What SGLang's models call that a plain CPU has not; the hooks are listed in serving/hooks.py."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_NATIVE = "torch_native"


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
    if backend_name != _NATIVE:
        handler: Callable[..., Any] = original(registry, backend_name)
        return handler
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import (
        AttnForwardMethod,
    )

    return lambda *_: AttnForwardMethod.MLA


def handle_model_specific_adjustments(original: Callable[[Any], None], args: Any) -> None:
    """Let models with attention sinks start on SGLang's plainest attention, which gets them below.

    SGLang takes it where it is called Intel's, of which it is what is left without AMX.
    """
    from sglang.srt.arg_groups.overrides import declare_resolution, resolved_view

    is_native = resolved_view(args).attention_backend == _NATIVE
    if is_native:
        declare_resolution(args, "mixedprec", attention_backend="intel_amx")
    original(args)
    if is_native:
        declare_resolution(args, "mixedprec", attention_backend=_NATIVE)


def attend(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run prefill or decoding of SGLang's plainest attention, with `sinks` [H] where a model has.

    Source: transformers' models/gpt_oss/modeling_gpt_oss.py, `eager_attention_forward`.
    """
    sinks = kwargs.pop("sinks", None)
    if sinks is None:
        return original(*args, **kwargs)
    from sglang.srt.layers.attention import torch_native_backend as native

    plain = native.scaled_dot_product_attention
    native.scaled_dot_product_attention = functools.partial(_attend_with_sinks, plain, sinks)
    try:
        return original(*args, **kwargs)
    finally:
        native.scaled_dot_product_attention = plain


def _attend_with_sinks(
    attention: Callable[..., torch.Tensor],
    sinks: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    """Attend to one key more, whose score is the head's sink and whose value is zeros.

    Args:
        attention: torch's.
        sinks: [H].
        query: [1, H, Q, D].
        key: [1, H or fewer, K, D].
        value: as `key`.
        attn_mask: bool [Q, K], true for what is attended to.
    """
    import torch

    num_queries, num_keys = query.shape[2], key.shape[2]
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
    seen = seen.tril() if is_causal else seen
    seen = seen if attn_mask is None else seen & attn_mask
    scores = torch.zeros_like(seen, dtype=query.dtype).masked_fill_(~seen, -torch.inf)
    last = sinks.to(query.dtype).view(-1, 1, 1).expand(-1, num_queries, 1)
    mask = torch.cat([scores.expand(len(sinks), -1, -1), last], dim=-1).unsqueeze(0)
    key, value = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (key, value))
    return attention(query, key, value, attn_mask=mask, is_causal=False, **kwargs)
