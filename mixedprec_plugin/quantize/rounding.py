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
import math
from typing import NamedTuple, TypeAlias

import torch

# of codes that a scale alone multiplies
LARGEST_CODE = {torch.float8_e4m3fn: torch.finfo(torch.float8_e4m3fn).max, torch.int8: 127.0}


def divided(values: torch.Tensor, number: float) -> torch.Tensor:
    """values / number, rounded as IEEE 754 says on every device.

    CUDA multiplies by the reciprocal of what is a plain number (torch's BinaryDivTrueKernel.cu).
    """
    return values / torch.full((), number, dtype=values.dtype, device=values.device)


class Levels(NamedTuple):
    """How a float32 number is rounded to a code, ties to even.

    Attributes:
        least: from here on codes have a fixed number of significant bits; below, a fixed step.
        step: what is below is a multiple of it.
        bits: significant bits of the others.
    """

    least: float
    step: float
    bits: int


# scales and zero points
Pair: TypeAlias = tuple[torch.Tensor, torch.Tensor]

WHOLE = Levels(math.inf, 1.0, 0)
# multiples of the plain scale that are tried
_RATIOS = tuple(1.06 - 0.03 * step for step in range(13))
_SYMMETRIC_RATIOS = (1.10, 1.07, 1.04, 1.0, *_RATIOS[3:])


def _multiples(plain: torch.Tensor, ratios: tuple[float, ...]) -> torch.Tensor:
    return plain * torch.tensor(ratios, device=plain.device)[:, None]


@dataclasses.dataclass(frozen=True)
class Tiles:
    """8-bit codes beside a scale for each tile of a weight, as `quantize.scaled` has them.

    Attributes:
        dtype: of the codes, int8 or float8_e4m3fn.
        rows, columns: of a tile; None for all.
    """

    dtype: torch.dtype
    rows: int | None
    columns: int | None

    symmetric = True
    scale_dtype = torch.float32
    # multiples of the plain scale that are tried
    ratios = _SYMMETRIC_RATIOS

    @property
    def largest_code(self) -> float:
        return LARGEST_CODE[self.dtype]

    @property
    def lowest_code(self) -> float:
        return -self.largest_code

    @property
    def levels(self) -> Levels:
        return Levels(2.0**-6, 2.0**-9, 4) if self.dtype.is_floating_point else WHOLE

    def candidates(self, low: torch.Tensor, high: torch.Tensor) -> Pair:
        """Scales to try for tiles that range from `low` to `high`; see `Grid.candidates`."""
        plain = torch.maximum(high, -low) / self.largest_code
        scales = self.store(_multiples(plain, self.ratios))
        return scales, torch.zeros_like(scales)

    def store(self, magnitude: torch.Tensor) -> torch.Tensor:
        """Scales as they are stored, float32; see `store_scale`."""
        return store_scale(magnitude, self.scale_dtype)


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

    lowest_code = 0
    levels = WHOLE
    # rows that share a scale
    rows: int | None = 1

    @property
    def largest_code(self) -> int:
        return (1 << self.bits) - 1

    def candidates(self, low: torch.Tensor, high: torch.Tensor) -> Pair:
        """Scales and zero points to try for groups that range from `low` to `high`.

        Args:
            low: float32 [N], not above 0.
            high: float32 [N], not below 0.
        Returns:
            both float32 [C, N], scales of `scale_dtype`'s numbers.
        """
        half = (self.largest_code + 1) / 2
        if self.symmetric:
            scales = _multiples(torch.maximum(high, -low) / half, _SYMMETRIC_RATIOS)
            scales = store_scale(scales, self.scale_dtype)
            scales = torch.cat([scales, -scales])
            return scales, torch.full_like(scales, half)
        scales = store_scale(
            _multiples((high - low) / self.largest_code, _RATIOS), self.scale_dtype
        )
        middle = (half - 0.5 - (low + high) / 2 / scales).round_()
        zeros = torch.cat([(middle + step).clamp_(0, self.largest_code) for step in (0, -1, 1)])
        return scales.repeat(3, 1), zeros

    def store(self, magnitude: torch.Tensor) -> torch.Tensor:
        """Scales as they are stored, float32; see `store_scale`."""
        return store_scale(magnitude, self.scale_dtype)

    def fit(self, low: torch.Tensor, high: torch.Tensor) -> Pair:
        """Return scale and zero point for groups that range from `low` to `high`, float32.

        Returns:
            scale, float32 but representable in `scale_dtype`, and zero, float32 of whole numbers in
            0..largest_code; both of the shape of `low`. NaN or Inf where the group holds any.
        """
        if self.symmetric:
            half = 1 << (self.bits - 1)
            larger, smaller = torch.maximum(high, -low), torch.minimum(high, -low)
            magnitude = torch.maximum(divided(larger, half + 0.5), divided(smaller, half - 0.5))
            scale = store_scale(magnitude, self.scale_dtype)
            return torch.where(high > -low, -scale, scale), torch.full_like(scale, half)
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = store_scale(divided(high - low, self.largest_code), self.scale_dtype)
        return scale, (-low / scale).round_().clamp_(0, self.largest_code)


def store_scale(magnitude: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round scales to the dtype that they are stored in, never to zero.

    Args:
        magnitude: float32, not negative; not modified.
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
