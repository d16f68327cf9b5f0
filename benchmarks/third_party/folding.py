"""Which layers of a checkpoint have other layers' scales folded into them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch

Tensors = Mapping[str, torch.Tensor]
# norm -> the layers that read its output
CONSUMERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
_NORM = re.compile(r"^(.*layers\.\d+)\.(input_layernorm|post_attention_layernorm)\.weight$")


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative root mean square difference of a from b."""
    return float((a - b).norm() / b.norm())


def folded_norms(dense: Tensors, base: Tensors) -> Iterator[tuple[str, float]]:
    """Yield each norm of the decoder and its distance from the original's."""
    for name in dense:
        if _NORM.match(name):
            yield name, distance(dense[name].float(), base[name].float())


def unfold(dense: Tensors, base: Tensors) -> dict[str, torch.Tensor]:
    """Undo what was folded into norms, and from down_proj's columns into up_proj's rows.

    Args:
        dense: plain weights of a checkpoint.
        base: those of the original.
    Returns:
        `dense` with the original's norms, its consumers' columns rescaled to fit them; each row of
        up_proj rescaled to its length in the original, down_proj's columns to fit.
    """
    plain = {name: tensor.float() for name, tensor in dense.items()}
    for name in dense:
        match = _NORM.match(name)
        if match is None:
            continue
        layer, norm = match.groups()
        ratio = plain[name] / base[name].float()
        plain[name] = base[name].float()
        for consumer in CONSUMERS[norm]:
            weight = f"{layer}.{consumer}.weight"
            plain[weight] = plain[weight] * ratio
    for name in [name for name in plain if name.endswith(".mlp.up_proj.weight")]:
        rows = plain[name].norm(dim=1) / base[name].float().norm(dim=1)
        plain[name] = plain[name] / rows[:, None]
        down = name.replace("up_proj", "down_proj")
        plain[down] = plain[down] * rows
    return plain
