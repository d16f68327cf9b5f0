"""FP4 e2m1 in blocks along K, two codes a byte: W = q * scale * global_scale.

    packed   uint8 [N, K/2]; a byte holds an even column in its low nibble and the next in its high
    scales   [N, K/G]: NVFP4's are e4m3, MXFP4's powers of two, e8m0
    global   one float32; of MXFP4 1

A code is a sign above three bits that count up 0, 0.5, 1, 1.5, 2, 3, 4, 6.
Source: OCP Microscaling v1.0, 5.3.3 (e2m1), 5.4.1 (e8m0); ModelOpt `NVFP4QTensor`,
compressed-tensors `NVFP4PackedCompressor` and `MXFP4PackedCompressor`.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from mixedprec_plugin.quantize.checks import refuse, require_finite, take, take_matrix, weight_shape
from mixedprec_plugin.quantize.chunks import empty, float_chunks, is_compiled, row_chunks
from mixedprec_plugin.quantize.codec import Tensors
from mixedprec_plugin.quantize.rounding import Levels, Pair, Tiles, divided
from mixedprec_plugin.quantize.scaled import Scaled

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST = VALUES[-1]
E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
# dtype of scales -> the least code that is tried, and the largest number's
_SCALE_CODES = {E4M3: (1, 0x7E), E8M0: (1, 0xFE)}
# Codes around the one that makes a block's largest magnitude 6. Of e4m3, by squared error, the best
# of these five is 16% nearer to real weights than the one, and the best of ten 17%; four and five
# further, the largest magnitude becomes 4, and the codes 3, 4 and 6 lie closer together. Of e8m0 no
# third one is ever the best.
_SCALE_STEPS = {E4M3: (-1, 0, 1, 4, 5), E8M0: (0, 1)}
# Of weights no larger than 21, which nearly all are: shards of a fused module share it so, whoever
# quantizes them. As a power of two it is exact in 16 bits, to which Marlin rounds it.
_USUAL_GLOBAL_EXPONENT = -7
# numbers that compiled loops read
_COMPILED = (torch.bfloat16, torch.float32)
USUAL_GLOBAL = 2.0**_USUAL_GLOBAL_EXPONENT
# the largest weight of a block that has the least scale of e4m3; the least that float16 has
_LEAST, _NOTHING = LARGEST * 2.0**-9 * USUAL_GLOBAL, 2.0**-24


@dataclasses.dataclass(frozen=True)
class Fp4:
    """The numbers of a weight.

    Attributes:
        packed: uint8 [N, K/2].
        scales: [N, K/G], float8.
        global_scale: float32 []; multiplies.
        input_scale: of activations with a static scale, float32 [].
    """

    packed: torch.Tensor
    scales: torch.Tensor
    global_scale: torch.Tensor
    input_scale: torch.Tensor | None = None

    def dequantize(self) -> torch.Tensor:
        """Return float32 [N, K]; q * scale is exact, its product with the global scale rounded."""
        N, K = self.packed.shape[0], 2 * self.packed.shape[1]
        weight = empty((N, K), torch.float32, self.packed.device)
        if is_compiled(self.packed, N * K):
            from mixedprec_plugin.quantize.compiled_decoding import decode_fp4

            decode_fp4(self.packed, self.scales, self.global_scale, weight)
            return weight
        for rows in row_chunks(N, K):
            decode(self.packed[rows], self.scales[rows], weight[rows]).mul_(self.global_scale)
        return weight


def take_blocks(
    tensors: Tensors, codes: str, dtype: torch.dtype, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return stored codes, uint8 [N, K/2], and "weight_scale" [N, K/G] of a dtype.

    Raises:
        ShapeError: one is missing, or of another shape or dtype.
    """
    packed = take_matrix(tensors, codes, torch.uint8, "[N, K/2]")
    take_matrix(tensors, "weight_scale", dtype, f"[N, K/{group_size}]")
    shape = packed.shape[0], 2 * packed.shape[1] // group_size
    return packed, take(tensors, "weight_scale", shape)


@dataclasses.dataclass(frozen=True)
class Fp4Tiles(Tiles):
    """FP4 codes, held in e4m3, with an e4m3 scale a block beside the usual scale of the whole."""

    # with 1.5 the largest magnitude is 4
    ratios = (*Tiles.ratios, 1.5, 1.4, 1.3, 1.2)

    @property
    def largest_code(self) -> float:
        return LARGEST

    @property
    def levels(self) -> Levels:
        return Levels(1.0, 0.5, 2)

    def candidates(self, low: torch.Tensor, high: torch.Tensor) -> Pair:
        """Scales to try for blocks that range from `low` to `high`; see `Grid.candidates`.

        Raises:
            ShapeError: a weight is larger than the usual scale of the whole allows.
        """
        largest, limit = float(torch.maximum(high, -low).max()), LARGEST * 448 * USUAL_GLOBAL
        if largest > limit:
            what = f"values as large as {largest:.6g} are not calibrated (expected {limit} or less)"
            refuse("weight", what, "keep this layer in bf16", "scale-overflow")
        return super().candidates(low, high)

    def store(self, magnitude: torch.Tensor) -> torch.Tensor:
        """Scales as they are stored, times that of the whole, float32; never zero."""
        codes = (magnitude / USUAL_GLOBAL).clamp_(2.0**-9, 448).to(E4M3)
        return codes.float().mul_(USUAL_GLOBAL)


class Mxfp4Tiles(Fp4Tiles):
    """The same with a power of two a block."""

    # a smaller one cuts off more than it makes finer
    ratios = (1.0, 2.0)

    def candidates(self, low: torch.Tensor, high: torch.Tensor) -> Pair:
        return Tiles.candidates(self, low, high)

    def store(self, magnitude: torch.Tensor) -> torch.Tensor:
        """The nearest powers of two that e8m0 holds, float32; never zero."""
        return magnitude.log2().round_().clamp_(-126, 127).exp2_()


def packed_tiles(numbers: Scaled, dtype: torch.dtype = E4M3) -> Fp4:
    """Pack what was rounded on `Fp4Tiles`, with scales of a dtype."""
    N, K = numbers.codes.shape
    packed = torch.empty((N, K // 2), dtype=torch.uint8)
    for rows in row_chunks(N, K):
        packed[rows] = pack(numbers.codes[rows].float())
    whole = USUAL_GLOBAL if dtype == E4M3 else 1.0
    return Fp4(packed, (numbers.scales / whole).to(dtype), torch.tensor(whole))


def decode(packed: torch.Tensor, scales: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Write q * scale, exactly; bfloat16 and float16 would hold it, too.

    The three bits below a code's sign, moved up by nine, are a float16 of 2^-14 the value: e2m1's
    exponent is biased by 1, float16's by 15.

    Args:
        packed: uint8 [N, K/2].
        scales: [N, K/G], float8.
        weight: float32 [N, K], contiguous; overwritten.
    Returns:
        `weight`.
    """
    high = torch.empty((*packed.shape, 2), dtype=torch.uint8, device=packed.device)
    torch.bitwise_or((packed & 8) << 4, (packed & 7) << 1, out=high[..., 0])
    torch.bitwise_or(packed & 0x80, (packed & 0x70) >> 3, out=high[..., 1])
    halves = high.to(torch.int16).bitwise_left_shift_(8).view(torch.float16)
    grouped = weight.copy_(halves.flatten(1)).view(*scales.shape, -1)
    factors = scales.float()
    # e8m0 goes as far as float32
    larger = weight if scales.dtype == E8M0 else factors
    larger.mul_(2**14)
    grouped.mul_(factors.unsqueeze(2))
    return weight


def quantize_blocks(
    weight: torch.Tensor, group_size: int, dtype: torch.dtype = E4M3
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round a weight to the nearest codes, ties to even, with the block scales of least error.

    Args:
        weight: [N, K], floating point; not modified.
        group_size: elements along K that share a scale, 16 or 32.
        dtype: of scales, e4m3 or e8m0.
    Returns:
        packed uint8 [N, K/2], scales [N, K/G] and the global scale, float32, a power of two, beside
        e8m0 1.
    Raises:
        ShapeError: not a matrix of floats, not finite, K no multiple of the group size, or, beside
            e4m3, all too small.
    """
    N, K = weight_shape(weight)
    if K % group_size:
        what = f"K = {K} is not whole blocks (expected a multiple of {group_size})"
        refuse("weight", what, "keep this layer in bf16", "group-size")
    packed = empty((N, K // 2), torch.uint8, weight.device)
    scales = empty((N, K // group_size), dtype, weight.device)
    global_scale = _global_scale(weight, dtype)
    is_whole = is_compiled(weight, dtypes=_COMPILED)
    for rows, values in [(slice(N), weight)] if is_whole else float_chunks(weight):
        if is_compiled(values, N * K, _COMPILED):
            from mixedprec_plugin.quantize import compiled_fp4

            how = float(global_scale), _SCALE_STEPS[dtype], _SCALE_CODES[dtype]
            compiled_fp4.quantize(values, group_size, *how, packed[rows], scales[rows])
            continue
        blocks = values.view(-1, group_size).div_(global_scale)
        chosen = _best_scales(blocks.abs(), dtype)
        scales[rows] = chosen.view(-1, K // group_size)
        magnitudes = nearest((blocks.abs() / chosen.float()).clamp_(max=LARGEST))
        packed[rows] = pack(magnitudes.copysign_(blocks).view(-1, K))
    return packed, scales, global_scale


def _global_scale(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The power of two with which the largest block scale is an e4m3 number, float32.

    Raises:
        ShapeError: not finite, or so small that no block has another scale than the least.
    """
    low, high = torch.aminmax(weight)
    largest = torch.maximum(high, -low).float()
    require_finite(largest, weight)
    if dtype == E8M0:
        return torch.tensor(1.0, device=weight.device)
    if _NOTHING <= float(largest) < _LEAST:
        what = f"values no larger than {float(largest):.3g} (expected {_LEAST:.3g} or more)"
        refuse("weight", what, "keep this layer in bf16", "scale-underflow")
    needed = math.frexp(float(largest) / LARGEST / 448)[1]
    return torch.tensor(2.0 ** max(_USUAL_GLOBAL_EXPONENT, needed), device=weight.device)


def _best_scales(magnitudes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The scales with which blocks [B, G] are rounded with the least squares, [B, 1]."""
    first = divided(magnitudes.amax(1, keepdim=True), LARGEST).to(dtype).view(torch.uint8).int()
    least = codes = torch.empty(0)
    for step in _SCALE_STEPS[dtype]:
        # the least scale serves blocks of zeros, too
        tried = (first + step).clamp_(*_SCALE_CODES[dtype]).to(torch.uint8)
        scale = tried.view(dtype).float()
        rounded = nearest((magnitudes / scale).clamp_(max=LARGEST))
        error = _sum(rounded.mul_(scale).sub_(magnitudes).square_())
        if not len(codes):
            least, codes = error, tried
        else:
            codes = torch.where(error < least, tried, codes)
            least = torch.minimum(error, least)
    return codes.view(dtype)


def _sum(values: torch.Tensor) -> torch.Tensor:
    """Sums of blocks [B, G], [B, 1], added in one order on every device.

    It is the order of torch's `sum` on x86: eight lanes, and then the lanes.
    """
    lanes = values[:, :8]
    for first in range(8, values.shape[1], 8):
        lanes = lanes + values[:, first : first + 8]
    total = lanes[:, :1]
    for lane in range(1, lanes.shape[1]):
        total = total + lanes[:, lane : lane + 1]
    return total


def nearest(magnitudes: torch.Tensor) -> torch.Tensor:
    """Round float32 numbers in 0..6 to the nearest value of e2m1, ties to the even code.

    From one on a number has a bit behind its first; below, the values are multiples of a half.
    """
    powers = (magnitudes.view(torch.int32) & 0x7F800000).view(torch.float32)
    steps = powers.clamp_(min=1.0).mul_(0.5)
    return (magnitudes / steps).round_().mul_(steps)


def pack(values: torch.Tensor) -> torch.Tensor:
    """Pack values of e2m1, float32 [R, K], to uint8 [R, K/2]."""
    doubled = values.abs().mul_(2).to(torch.uint8)
    # 0, 1, 2, 3, 4, 6, 8, 12 -> 0..7
    codes = doubled - (doubled > 4).byte() - (doubled > 6).byte() - 3 * (doubled > 8).byte()
    codes += torch.signbit(values).byte() << 3
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def share_scale(
    scales: torch.Tensor, whole: torch.Tensor, shared: torch.Tensor
) -> torch.Tensor | None:
    """Tell block scales beside another scale of the whole.

    Args:
        scales: e4m3 [N, K/G], beside `whole`.
        whole, shared: float32, one element each.
    Returns:
        e4m3 [N, K/G], with scales * whole = result * shared; None where e4m3 holds no such numbers.
    """
    exact = scales.double() * (whole.double() / shared.double())
    made = exact.to(E4M3)
    return made if bool((made.double() == exact).all()) else None
