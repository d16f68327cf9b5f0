"""What a layer of experts is defined to compute, in float64, and how far kernels may be off."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import silu

from tests.gpu.exact import ROUNDING

# expert -> "gate", "up", "down" -> float64 [N, K]
Weights = Sequence[Mapping[str, torch.Tensor]]
# Gate and up are products of the same activations; a relative difference of the gate grows by 1.5
# at most through SiLU, in the mean square. The down projection is the second product.
_GATED = 1.5**2 + 1
_MARLIN_TILE_K = 64
# e4m3 rounds to half of an eighth, evenly spread; INT8 truncates by up to a 127th of the greatest
# of a group, of which 6 root mean squares are more than is seen
_FP8_ROUNDING = 2**-4 / math.sqrt(3)
_INT8_TRUNCATION = 6 / 127 / math.sqrt(3)


def expert_weights(stored: Mapping[str, Any], prefix: str, num_experts: int) -> Weights:
    """The weights that every expert runs with.

    Args:
        stored: layer name -> what is stored of it, as `tests.gpu.layers.Stored`.
        prefix: module name of the experts.
    Returns:
        per expert and projection float64 [N, K]. FP8 per tensor: SGLang rounds gate and up once
        more, to the greater of their scales (fp8.py, `Fp8MoEMethod`).
    """
    found = []
    for expert in range(num_experts):
        parts = {name: stored[f"{prefix}.{expert}.{name}_proj"] for name in ("gate", "up", "down")}
        weights = {name: part.weight for name, part in parts.items()}
        scales = [parts[name].tensors.get("weight_scale") for name in ("gate", "up")]
        if parts["gate"].method == "fp8" and all(s is not None and s.numel() == 1 for s in scales):
            scale = max(float(s) for s in scales if s is not None)
            for name in ("gate", "up"):
                codes = (weights[name] / scale).float().to(torch.float8_e4m3fn)
                weights[name] = codes.double() * scale
        found.append(weights)
    return found


def last_ranks(weights: Weights, tp_size: int) -> Weights:
    """The part of the last rank: of gate and up the last outputs, of down the last inputs."""
    found = []
    for expert in weights:
        inner = expert["gate"].shape[0] // tp_size
        found.append(
            {
                "gate": expert["gate"][-inner:],
                "up": expert["up"][-inner:],
                "down": expert["down"][:, -inner:],
            }
        )
    return found


def evaluate(x: torch.Tensor, factors: torch.Tensor, ids: torch.Tensor, weights: Weights) -> Any:
    """What the experts are defined to compute.

    Args:
        x: [T, H].
        factors: [T, choices], of the router.
        ids: [T, choices], experts; below 0 adds nothing.
    Returns:
        float64 [T, H].
    """
    values = x.double()
    total = torch.zeros_like(values)
    for expert, own in enumerate(weights):
        tokens, choices = torch.nonzero(ids == expert, as_tuple=True)
        rows = values[tokens]
        inner = silu(rows @ own["gate"].t()) * (rows @ own["up"].t())
        part = inner @ own["down"].t() * factors[tokens, choices].double()[:, None]
        total.index_add_(0, tokens, part)
    return total


def tolerance(methods: Sequence[str], hidden: int, inner: int) -> float:
    """Greatest relative root mean square of differences that roundings explain.

    Args:
        methods: canonical names of those that the layer's experts run in.
        hidden, inner: K of the first products and of the last, of one rank.
    """
    return max(_tolerance(method, hidden, inner) for method in methods)


def _tolerance(method: str, hidden: int, inner: int) -> float:
    first = last = 1.0
    if method in ("awq", "gptq", "nvfp4", "mxfp4"):
        # weights times scales; and parts of K that are added up in bfloat16, see exact.py
        first += 1 + (hidden / _MARLIN_TILE_K + 1) / 2
        last += 1 + (inner / _MARLIN_TILE_K + 1) / 2
    # what SiLU gives, and the sum of the choices
    squares = (first * _GATED + last + 2) * ROUNDING**2
    if method in ("fp8", "fp8_channel"):
        squares += (_GATED + 1) * _FP8_ROUNDING**2
    elif method in ("blockwise_int8", "int8_channel"):
        squares += (_GATED + 1) * _INT8_TRUNCATION**2
    return math.sqrt(squares)
