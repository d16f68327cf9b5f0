"""Linear layers that quantize their input as SGLang's CUDA kernels do, in plain fp32 torch.

The reference for the quality benchmark: written from the kernels' formulas, sharing no code with
the package. Codes and scales are exact; the product is one fp32 matmul.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional

FP8_MAX = 448.0
INT8_MAX = 127.0
_EPSILON = 1e-10

Quantizer = Callable[[torch.Tensor], torch.Tensor]


def fp8_group(x: torch.Tensor, group_size: int = 128) -> torch.Tensor:
    """Round fp32 activations [..., K] to FP8 e4m3 with a scale for each token and group along K.

    Source: SGLang's per_token_group_quant_fp8: scale = max(absmax, 1e-10) / 448.
    """
    groups = x.reshape(*x.shape[:-1], -1, group_size)
    scale = groups.abs().amax(-1, keepdim=True).clamp_min(_EPSILON) / FP8_MAX
    return (_round_fp8(groups / scale) * scale).reshape(x.shape)


def fp8_token(x: torch.Tensor) -> torch.Tensor:
    """Round fp32 activations [..., K] to FP8 e4m3 with one scale a token.

    Source: SGLang's per_token_quant_fp8: scale = absmax / 448; a row of zeros stays zero.
    """
    scale = x.abs().amax(-1, keepdim=True) / FP8_MAX
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    return _round_fp8(x * inverse) * scale


def int8_group(x: torch.Tensor, group_size: int = 128) -> torch.Tensor:
    """Bring fp32 activations [..., K] to INT8 with a scale for each token and group along K.

    Source: SGLang's per_token_group_quant_int8: scale = max(absmax, 1e-10) / 127, and the
    quotient is truncated towards zero, not rounded.
    """
    groups = x.reshape(*x.shape[:-1], -1, group_size)
    scale = groups.abs().amax(-1, keepdim=True).clamp_min(_EPSILON) / INT8_MAX
    return ((groups / scale).clamp(-128, 127).trunc() * scale).reshape(x.shape)


def input_quantizer(method: str, arguments: Mapping[str, Any]) -> Quantizer | None:
    """Return what a method does to its input; None for the weight-only methods.

    Args:
        method: canonical method name.
        arguments: the method's arguments, complete.
    Raises:
        ValueError: static activation scales, which need calibration.
    """
    if method not in ("fp8", "blockwise_int8"):
        return None
    if arguments["activation_scheme"] != "dynamic":
        raise ValueError(f"activation_scheme: {arguments['activation_scheme']!r} has no reference")
    block = arguments["weight_block_size"]
    if block is None:
        return fp8_token
    group = fp8_group if method == "fp8" else int8_group
    return lambda x: group(x, block[1])


class QuantizedInputLinear(torch.nn.Module):
    """A linear layer over a quantized input.

    Args:
        weight: [N, K] float32, dequantized.
        bias: [N] or None.
        quantize_input: what is done to the input; None for nothing.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, quantize_input: Quantizer | None
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.quantize_input = quantize_input

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply [..., K] by the weight: [..., N]."""
        if self.quantize_input is not None:
            x = self.quantize_input(x)
        return functional.linear(x, self.get_buffer("weight"), self.bias)  # type: ignore[arg-type]


def _round_fp8(x: torch.Tensor) -> torch.Tensor:
    """Clamp and round to the nearest e4m3 value, ties to even."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float()
