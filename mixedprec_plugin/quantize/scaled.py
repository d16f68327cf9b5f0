"""8-bit codes beside a scale for each [block_n, block_k] tile: W = (q - zero) * scale.

The grid of scales is ceil(N / block_n) x ceil(K / block_k); tiles at the lower and right edges may
be ragged. Reads what compressed-tensors (int-, float- and naive-quantized), gptqmodel (whose scales
are reciprocals: W = q / scale) and torchao (plain codes) store, and our own methods.
Source: DeepSeek-V3's blocks, compressed-tensors `dequantize`, gptqmodel's `weight_scale_semantics`,
torchao `Float8Tensor.dequantize` and `IntxUnpackedToInt8Tensor.dequantize`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch.nn.functional import pad

from mixedprec_plugin.quantize.checks import refuse, require_finite, take, take_matrix, weight_shape
from mixedprec_plugin.quantize.chunks import empty, float_chunks, is_compiled, row_chunks
from mixedprec_plugin.quantize.codec import Arguments, Numbers, TensorDict, Tensors
from mixedprec_plugin.quantize.rounding import LARGEST_CODE, Tiles, divided

# (rows, columns) that share a scale; None for all of them
Block: TypeAlias = tuple[int | None, int | None]

E4M3 = torch.float8_e4m3fn
# see `e4m3_halves`
E4M3_UNIT = 256.0
# what compiled loops read
_DECODED = (E4M3, torch.int8, torch.uint8)
# Below the smallest normal number a quotient would lose the half-a-step bound, or divide by zero.
_SMALLEST_SCALE = torch.finfo(torch.float32).smallest_normal


@dataclasses.dataclass(frozen=True)
class Scaled:
    """The numbers of a weight.

    Attributes:
        codes: [N, K], one byte each.
        scales: float32 [ceil(N/bn), ceil(K/bk)].
        block: (bn, bk); (1, K) for channels and (N, K) for the whole tensor.
        zeros: float32, as `scales`; None where codes are symmetric.
        reciprocal: whether scales divide.
        input_scale: of activations with a static scale, one element.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    block: tuple[int, int]
    zeros: torch.Tensor | None = None
    reciprocal: bool = False
    input_scale: torch.Tensor | None = None

    def dequantize(self) -> torch.Tensor:
        """Return float32 [N, K], rounded once."""
        N, K = self.codes.shape
        weight = empty((N, K), torch.float32, self.codes.device)
        if not self.reciprocal and is_compiled(self.codes, dtypes=_DECODED):
            from mixedprec_plugin.quantize.compiled_decoding import decode

            decode(self.codes, self.zeros, self.scales, self.block, weight)
            return weight
        for rows in row_chunks(N, K):
            chunk = weight[rows]
            if self.codes.dtype == E4M3:
                decode_e4m3(self.codes[rows], chunk)
            else:
                chunk.copy_(self.codes[rows])
            if self.zeros is not None:
                chunk.sub_(_spread(self.zeros, rows, self.block, K))
            spread = _spread(self.scales, rows, self.block, K)
            if self.reciprocal:
                chunk.div_(spread)
            else:
                chunk.mul_(spread)
        return weight


def read(tensors: Tensors, arguments: Arguments) -> Scaled:
    """Tell the codes and scales of a layer.

    Args:
        tensors: parameter suffix -> tensor; not modified.
        arguments: "codes", "scale" and "zero_point", suffixes of the codes [N, K] (one byte each),
            of the scales (ceil(N/bn) x ceil(K/bk) of them in any shape, any floating dtype) and of
            the zero points (as many integers; may be missing); "block", [bn, bk], [1, K] for
            channels and [N, K] for the whole tensor; "reciprocal", whether scales divide.
    Raises:
        ShapeError: the codes are no matrix of bytes, or the scales or zeros are missing or another
            number of them.
    """
    codes = tensors[arguments["codes"]]
    if codes.dim() != 2 or codes.element_size() != 1:
        what = f"{codes.dtype} {list(codes.shape)} (expected one byte an element, [N, K])"
        remedy = "check quantization_config against the checkpoint"
        refuse(arguments["codes"], what, remedy, "tensor-dtype")
    N, K = codes.shape
    block_n, block_k = arguments["block"]
    grid = -(-N // block_n), -(-K // block_k)
    scales, zeros = _grid(tensors, arguments["scale"], grid), None
    if arguments["zero_point"] in tensors:
        zeros = _grid(tensors, arguments["zero_point"], grid)
    reciprocal, inputs = arguments["reciprocal"], tensors.get("input_scale")
    return Scaled(codes, scales, (block_n, block_k), zeros, reciprocal, inputs)


def _grid(tensors: Tensors, suffix: str, grid: tuple[int, int]) -> torch.Tensor:
    """One float32 a tile, [ceil(N/bn), ceil(K/bk)]."""
    tensor = tensors.get(suffix)
    if tensor is not None and tensor.numel() == grid[0] * grid[1] and 1 in grid:
        return tensor.float().reshape(grid)
    return take(tensors, suffix, grid).float()


def _spread(grid: torch.Tensor, rows: slice, block: tuple[int, int], K: int) -> torch.Tensor:
    """Repeat the tiles' values over the elements of some rows: [rows, K] or [rows, 1]."""
    tiles = torch.arange(rows.start, rows.stop, device=grid.device) // block[0]
    chosen = grid[tiles]
    if grid.shape[1] == 1:
        return chosen
    return chosen.repeat_interleave(block[1], dim=1)[:, :K]


@dataclasses.dataclass(frozen=True)
class TileCodec:
    """A codec of symmetric codes "weight" [N, K] beside a scale a tile; see `codec.Codec`.

    Scales are float32 [ceil(N/bn), ceil(K/bk)], or [] where one is all; W = q * scale. One that is
    stored for all becomes every channel's.

    Attributes:
        dtype: of the codes.
        layout: arguments -> suffix of the scales, and the tile.
    """

    dtype: torch.dtype
    layout: Callable[[Arguments], tuple[str, Block]]

    def quantize(
        self, weight: torch.Tensor, arguments: Arguments, _dtype: torch.dtype
    ) -> TensorDict:
        """Scale every tile so that its largest magnitude is the largest code; ties to even."""
        suffix, block = self.layout(arguments)
        codes, scales = quantize_tiles(weight, block, self.dtype)
        return {"weight": codes, suffix: _stored(scales, block)}

    def grid(self, arguments: Arguments, _dtype: torch.dtype) -> Tiles:
        """Codes with a scale for each of the method's tiles."""
        return Tiles(self.dtype, *self.layout(arguments)[1])

    def read(self, tensors: Tensors, arguments: Arguments) -> Scaled:
        """Tell the numbers of stored tensors."""
        suffix, block = self.layout(arguments)
        codes = take_matrix(tensors, "weight", self.dtype, "[N, K]")
        tile = _whole(block, codes)
        how = {"codes": "weight", "scale": suffix, "zero_point": "", "reciprocal": False}
        return read(tensors, {**how, "block": tile})

    def write(self, numbers: Numbers, arguments: Arguments, _dtype: torch.dtype) -> TensorDict:
        """Store codes as they are, scales in float32, which holds all."""
        assert isinstance(numbers, Scaled)
        suffix, block = self.layout(arguments)
        scales = numbers.scales.expand(_grid_shape(numbers.codes, _whole(block, numbers.codes)))
        made = {"weight": numbers.codes, suffix: _stored(scales, block)}
        if numbers.input_scale is not None:
            made["input_scale"] = numbers.input_scale.float().view(())
        return made


def _stored(scales: torch.Tensor, block: Block) -> torch.Tensor:
    return scales.view(()) if block == (None, None) else scales.contiguous()


def _whole(block: Block, weight: torch.Tensor) -> tuple[int, int]:
    N, K = weight.shape
    return block[0] or N, block[1] or K


def _grid_shape(weight: torch.Tensor, tile: tuple[int, int]) -> tuple[int, int]:
    N, K = weight.shape
    return -(-N // tile[0]), -(-K // tile[1])


def quantize_tiles(
    weight: torch.Tensor, block: Block, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale every tile of a weight so that its largest magnitude is the largest code; encode it.

    Args:
        weight: [N, K], floating point; not modified.
        dtype: of the codes.
    Returns:
        codes [N, K] of `dtype`, the nearest, ties to even, and scales float32
        [ceil(N/bn), ceil(K/bk)]; weight ~= q * scale.
    Raises:
        ShapeError: not a matrix of floats, or not finite.
    """
    N, K = weight_shape(weight)
    tile = _whole(block, weight)
    codes = empty((N, K), dtype, weight.device)
    if is_compiled(weight):
        from mixedprec_plugin.quantize import compiled

        low, high = compiled.ranges(weight, tile[1])
        scales = _scales(torch.maximum(high, -low), tile[0], dtype)
        compiled.encode(weight, scales, tile, codes)
    else:
        scales = torch.empty(_grid_shape(weight, tile), device=weight.device)
        is_whole = tile == (N, K)
        if is_whole:
            tops = torch.stack(torch.aminmax(weight)).float().abs().amax()
            scales = _scales(tops.view(1, 1), 1, dtype)
        for rows, values in float_chunks(weight, 1 if is_whole else tile[0]):
            if not is_whole:
                own = slice(rows.start // tile[0], -(-rows.stop // tile[0]))
                scales[own] = _scales(_tops(values, tile[1]), tile[0], dtype)
            values.div_(_spread(scales, rows, tile, K))
            codes[rows].copy_(values if dtype.is_floating_point else values.round_())
    require_finite(scales, weight)
    return codes, scales


def _tops(values: torch.Tensor, size: int) -> torch.Tensor:
    """The largest magnitude of each `size` columns of a row, [R, ceil(K/size)]; or NaN."""
    ragged = -values.shape[1] % size
    groups = (pad(values, (0, ragged)) if ragged else values).view(len(values), -1, size)
    # `aminmax` takes six times as long along a dimension
    return torch.maximum(groups.amax(2), -groups.amin(2))


def _scales(tops: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Scales that make the largest magnitude of `size` rows the largest code, [ceil(R/size), ...].

    No clamping is needed afterwards: they are exact to half a unit in the last place, so that no
    quotient rounds past the largest code.
    """
    whole = pad(tops, (0, 0, 0, -len(tops) % size)).view(-1, size, tops.shape[1])
    return divided(whole.amax(1), LARGEST_CODE[dtype]).clamp_(min=_SMALLEST_SCALE)


def decode_e4m3(codes: torch.Tensor, values: torch.Tensor) -> None:
    """Write e4m3 codes as floats, four times as fast as torch's own cast on a CPU."""
    if bool(codes.view(torch.int8).bitwise_and(0x7F).amax() == 0x7F):
        values.copy_(codes)
        return
    values.copy_(e4m3_halves(codes)).mul_(E4M3_UNIT)


def e4m3_halves(codes: torch.Tensor) -> torch.Tensor:
    """The values of e4m3 codes in units of E4M3_UNIT, by moving their bits.

    The seven bits below the sign, moved up by seven, are a float16 of 1/256 the value: e4m3's
    exponent is biased by 7, float16's by 15. torch's own conversion is scalar code on a CPU: 3.6 ns
    an element where this takes 0.2 ns.

    Args:
        codes: float8_e4m3fn, any shape, finite (NaN comes out as +-480).
    Returns:
        float16: value / 256, exact, subnormals included.
    """
    bits = codes.view(torch.int8).to(torch.int16)
    # after the shift bits 15 and 14 both hold the sign; float16's exponent begins at bit 14
    return bits.bitwise_left_shift_(7).bitwise_and_(~0x4000).view(torch.float16)
