"""8-bit weights with a scale a group, weight-only."""

from __future__ import annotations

import dataclasses

import torch

from mixedprec_plugin.cpu.weight_only import dequantize, multiply

# Up to so many tokens torch's kernel is faster; measured by benchmarks/cpu_linear.py.
_KERNEL_TOKENS = 16
# Flips the sign bit: code - 128 as int8.
_SIGN = 0x80


@dataclasses.dataclass(frozen=True)
class Int8Weight:
    """A weight that is kept in 8 bits.

    Attributes:
        packed: int8 [N, K], W = packed * scale.
        scales: bfloat16 or float16 [K/G, N].
    """

    packed: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def pack(cls, codes: torch.Tensor, scales: torch.Tensor) -> Int8Weight:
        """Take codes, uint8 [N, K] with zero point 128."""
        return cls((codes ^ _SIGN).view(torch.int8), scales)

    def unpack(self) -> torch.Tensor:
        """The codes, uint8 [N, K]."""
        return self.packed.view(torch.uint8) ^ _SIGN

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply [T, K] by the weight, [T, N].

        Few tokens by a weight with one scale a channel go through torch's kernel, which scales the
        sum as Marlin does; all else is multiplied by the dequantized weight.
        """
        is_channelwise = self.scales.shape[0] == 1 and self.scales.dtype == torch.bfloat16
        if is_channelwise and x.shape[0] <= _KERNEL_TOKENS:
            return torch._weight_int8pack_mm(x.contiguous(), self.packed, self.scales[0])
        return multiply(x, dequantize(self.packed, 0, self.scales))
