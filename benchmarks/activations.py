"""Linear layers with a quantized input: SGLang's CUDA arithmetic in plain fp32 torch.

The reference for the quality benchmark: written from the kernels' formulas, sharing no code with
the package. Products are of codes, scaled as the kernels scale them: the order of roundings is
theirs, because a rounding that turns over here turns over codes further on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

FP8_MAX = 448.0
INT8_MAX = 127.0
_EPSILON = 1e-10
# input features whose products are summed at once
_SUM_SIZE = 128

Quantizer = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def fp8_group(x: torch.Tensor, group_size: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """Round activations to FP8 e4m3 with a scale for each token and group along K.

    Args:
        x: [T, K] float32.
        group_size: divides K.
    Returns:
        codes [T, K] and scales [T, K / group_size], both float32; x ~= codes * scales.
    Source: SGLang's per_token_group_quant.cuh: amax = max(absmax, 1e-10), scale = amax * fl(1/448),
        code = x * (448 / amax).
    """
    groups, amax = _groups(x, group_size)
    codes = _round_fp8(groups * (torch.full_like(amax, FP8_MAX) / amax))
    return codes.reshape(x.shape), amax[..., 0] * torch.tensor(1 / FP8_MAX)


def fp8_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round activations to FP8 e4m3 with one scale a token.

    Args:
        x: [T, K] float32.
    Returns:
        codes [T, K] and scales [T, 1], both float32.
    Source: SGLang's per_token_quant_fp8: scale = absmax / 448; a row of zeros stays zero.
    """
    scale = x.abs().amax(-1, keepdim=True) / FP8_MAX
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    return _round_fp8(x * inverse), scale


def int8_group(x: torch.Tensor, group_size: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """Bring activations to INT8 with a scale for each token and group along K.

    Args:
        x: [T, K] float32.
        group_size: divides K.
    Returns:
        codes [T, K] and scales [T, K / group_size], both float32.
    Source: SGLang's per_token_group_quant_int8: scale = max(absmax, 1e-10) / 127, and the
        quotient is truncated towards zero, not rounded.
    """
    groups, amax = _groups(x, group_size)
    scale = amax / INT8_MAX
    codes = (groups / scale).clamp(-128, 127).trunc()
    return codes.reshape(x.shape), scale[..., 0]


def int8_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round activations to INT8 with one scale a token.

    Args:
        x: [T, K] float32.
    Returns:
        codes [T, K] and scales [T, 1], both float32.
    Source: SGLang's _per_token_quant_int8: amax = max(absmax, 1e-10), scale = amax / 127,
        code = roundf(x * (127 / amax)), halves away from zero.
    """
    amax = x.abs().amax(-1, keepdim=True).clamp_min(_EPSILON)
    scaled = (x * (torch.full_like(amax, INT8_MAX) / amax)).double()
    # in double precision the half is exact, and is no more than added
    codes = (scaled.abs() + 0.5).floor().copysign(scaled)
    return codes.float(), amax / INT8_MAX


def input_quantizer(method: str, arguments: Mapping[str, Any]) -> Quantizer | None:
    """Return what a method does to its input; None for the weight-only methods.

    Args:
        method: canonical method name.
        arguments: the method's arguments, complete.
    Raises:
        ValueError: static activation scales, which need calibration.
    """
    if method == "fp8_channel":
        return fp8_token
    if method == "int8_channel":
        return int8_token
    if method not in ("fp8", "blockwise_int8"):
        return None
    if arguments["activation_scheme"] != "dynamic":
        raise ValueError(f"activation_scheme: {arguments['activation_scheme']!r} has no reference")
    block = arguments["weight_block_size"]
    if block is None:
        return fp8_token
    group = fp8_group if method == "fp8" else int8_group
    return lambda x: group(x, block[1])


def scales_by_row(
    scales: torch.Tensor, num_rows: int, block_size: list[int] | None
) -> torch.Tensor:
    """Spread a weight's scales over its rows.

    Args:
        scales: [ceil(N/BN), ceil(K/BK)] for blocks (BN, BK); [1] or [N, 1] without blocks.
        num_rows: N.
        block_size: (BN, BK) or None.
    Returns:
        float32 [N, ceil(K/BK)]; [N, 1] without blocks.
    """
    if block_size is None:
        return scales.float().reshape(-1, 1).expand(num_rows, 1)
    return scales.float().repeat_interleave(block_size[0], dim=0)[:num_rows]


class QuantizedInputLinear(torch.nn.Module):
    """A linear layer that multiplies codes by codes.

    Args:
        codes: [N, K] float32, the weight before its scales.
        scales: [N, B] float32, a scale for each row and K-block.
        bias: [N] or None, added after the product was rounded.
        quantize_input: [T, K] -> codes [T, K] and scales [T, B].
        joins_scales: whether the two scales are multiplied by each other first.
    """

    def __init__(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
        quantize_input: Quantizer,
        *,
        joins_scales: bool = False,
    ) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)
        self.quantize_input = quantize_input
        self.joins_scales = joins_scales

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply [..., K] by the weight: [..., N] in the dtype of x.

        Source: SGLang's _w8a8_block_fp8_matmul and its like: a float32 sum over K-blocks of
            (codes . codes) * token scale * weight scale, rounded once. Within a block of more than
            128 the sum is taken 128 at a time, as the platform does: another order of sums turns
            codes over in the next layer.
        """
        codes, token_scales = self.quantize_input(x.float().reshape(-1, x.shape[-1]))
        weight, scales = self.get_buffer("codes"), self.get_buffer("scales")
        size = -(-weight.shape[1] // scales.shape[1])
        total = torch.zeros(len(codes), len(weight))
        for block in range(scales.shape[1]):
            dot = torch.zeros(len(codes), len(weight))
            for start in range(block * size, min((block + 1) * size, weight.shape[1]), _SUM_SIZE):
                columns = slice(start, min(start + _SUM_SIZE, (block + 1) * size))
                dot += _multiply_codes(codes[:, columns], weight[:, columns])
            if self.joins_scales:
                total += dot * (token_scales[:, block, None] * scales[:, block])
            else:
                total += dot * token_scales[:, block, None] * scales[:, block]
        out = total.to(x.dtype).reshape(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.get_buffer("bias").to(x.dtype)


class WeightOnlyLinear(torch.nn.Module):
    """A linear layer with a float32 weight, whatever the dtype of its input.

    Args:
        weight: [N, K] float32, dequantized and not rounded.
        bias: [N] or None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply [..., K] by the weight: [..., N] in the dtype of x."""
        out = (x.float() @ self.get_buffer("weight").T).to(x.dtype)
        return out if self.bias is None else out + self.get_buffer("bias").to(x.dtype)


def _multiply_codes(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Multiply [T, K] by [N, K]: [T, N].

    Codes are exact in bfloat16: torch may use the CPU's bfloat16 units where it has them, as the
    platform lets it. They sum in float32, in an order of their own.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        return left @ right.T
    finally:
        matmul.fp32_precision = before


def _groups(x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, K] -> [T, K/G, G] and the greatest magnitudes [T, K/G, 1]."""
    groups = x.reshape(len(x), -1, group_size)
    return groups, groups.abs().amax(-1, keepdim=True).clamp_min(_EPSILON)


def _round_fp8(x: torch.Tensor) -> torch.Tensor:
    """Clamp and round to the nearest e4m3 value, ties to even."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float()
