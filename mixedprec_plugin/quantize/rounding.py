"""Group-wise round-to-nearest to unsigned integers: w ~= (q - zero) * scale.

Both grids map a group's whole range onto 2**bits codes with no error above half a step:

    asymmetric   scale = (max - min) / (2**bits - 1), zero = round(-min / scale), as AutoAWQ has it,
                 but min and max always include 0: a group of one sign would saturate otherwise.
    symmetric    zero = 2**(bits - 1). The codes reach one further down than up (-8..7 for 4 bits),
                 so the sign of the scale turns the side with the larger magnitude downwards:
                 |scale| = max(larger / (half + 1/2), smaller / (half - 1/2)), half = 2**(bits - 1).
                 Both ends then sit half a step outside the outermost codes. It is never coarser
                 than the usual largest / 7.5, and on real weights about 10% closer.

The scale is rounded to the dtype it is stored in first; codes are made with the rounded one.
"""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Grid:
    """What the codes of a group stand for.

    Attributes:
        bits: bits of a code.
        symmetric: whether zero is fixed at the middle code.
        scale_dtype: dtype that scales are stored in.
    """

    bits: int
    symmetric: bool
    scale_dtype: torch.dtype

    @property
    def largest_code(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def fit(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scale and zero point for groups that range from `low` to `high`.

        Args:
            low: float32, least value of each group; not modified.
            high: float32, largest value of each group; not modified.
        Returns:
            scale, float32 but representable in `scale_dtype`, and zero, float32 of whole numbers in
            0..largest_code; both of the shape of `low`. NaN or Inf where the group holds any.
        """
        if self.symmetric:
            half = 1 << (self.bits - 1)
            larger, smaller = torch.maximum(high, -low), torch.minimum(high, -low)
            magnitude = torch.maximum(larger / (half + 0.5), smaller / (half - 0.5))
            scale = store_scale(magnitude, self.scale_dtype)
            return torch.where(high > -low, -scale, scale), torch.full_like(scale, half)
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = store_scale((high - low) / self.largest_code, self.scale_dtype)
        return scale, (-low / scale).round_().clamp_(0, self.largest_code)


def store_scale(magnitude: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round scales to the dtype that they are stored in, never to zero.

    Args:
        magnitude: float32, not negative; not modified.
        dtype: bfloat16, float16 or float32.
    Returns:
        float32 of values of `dtype`: the nearest one, except that float16's subnormal numbers,
        whose steps are coarse, are rounded up so that no code saturates. Inf where `dtype`
        overflows.
    """
    info = torch.finfo(dtype)
    least = max(info.smallest_normal * info.eps, torch.finfo(torch.float32).smallest_normal)
    nearest = magnitude.to(dtype).float()
    upwards = (magnitude / least).ceil_().mul_(least)
    return torch.where(magnitude < info.smallest_normal, upwards, nearest).clamp_(min=least)


def round_groups(
    values: torch.Tensor, group_size: int, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round a few rows of a weight to a grid of codes.

    Args:
        values: [R, K], float32, contiguous; overwritten.
        group_size: elements along K that share a scale; divides K.
        grid: what the codes stand for.
    Returns:
        codes uint8 [R, K], scale float32 [R, K/G] representable in the grid's dtype, zero float32
        [R, K/G].
    """
    R, K = values.shape
    grouped = values.view(R, K // group_size, group_size)
    low, high = grouped.amin(-1), grouped.amax(-1)
    scale, zero = grid.fit(low, high)
    codes = grouped.div_(scale[..., None]).round_().add_(zero[..., None])
    codes.clamp_(0, grid.largest_code)
    # Casting to int8 is several times faster than to uint8: shift 0..255 to -128..127 and back.
    if grid.bits == 8:
        shifted = codes.sub_(128).to(torch.int8).view(torch.uint8)
        return shifted.bitwise_xor_(128).view(R, K), scale, zero
    return codes.to(torch.int8).view(torch.uint8).view(R, K), scale, zero
