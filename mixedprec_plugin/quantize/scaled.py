"""8-bit codes beside a scale for each [block_n, block_k] tile: W = (q - zero) * scale.

The grid of scales is ceil(N / block_n) x ceil(K / block_k); tiles at the lower and right edges may
be ragged. Reads what compressed-tensors (int-, float- and naive-quantized), gptqmodel (whose scales
are reciprocals: W = q / scale) and torchao (plain codes) store, and our own methods.
Source: DeepSeek-V3's blocks, compressed-tensors `dequantize`, gptqmodel's `weight_scale_semantics`,
torchao `Float8Tensor.dequantize` and `IntxUnpackedToInt8Tensor.dequantize`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from mixedprec_plugin.quantize.checks import refuse, require_finite, take, take_matrix, weight_shape
from mixedprec_plugin.quantize.chunks import (
    empty,
    float_block_chunks,
    float_chunks,
    is_compiled,
    row_chunks,
)
from mixedprec_plugin.quantize.codec import Arguments, Numbers, TensorDict, Tensors
from mixedprec_plugin.quantize.rounding import LARGEST_CODE, divided

E4M3 = torch.float8_e4m3fn
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
        refuse(
            arguments["codes"],
            f"{codes.dtype} {list(codes.shape)} (expected one byte an element, [N, K])",
            "check quantization_config against the checkpoint",
            "tensor-dtype",
        )
    N, K = codes.shape
    block_n, block_k = arguments["block"]
    grid = grid_shape(N, K, (block_n, block_k))
    has_zeros = arguments["zero_point"] in tensors
    return Scaled(
        codes,
        _grid(tensors, arguments["scale"], grid),
        (block_n, block_k),
        _grid(tensors, arguments["zero_point"], grid) if has_zeros else None,
        arguments["reciprocal"],
        tensors.get("input_scale"),
    )


def read_codes(
    tensors: Tensors, dtype: torch.dtype, scale: str, block: Sequence[int | None]
) -> Scaled:
    """Tell the numbers of symmetric codes "weight" [N, K], multiplied by scales of that suffix.

    Args:
        dtype: of the codes.
        block: [bn, bk]; None stands for all of N, or of K.
    Raises:
        ShapeError: a tensor is missing, or of another shape or dtype.
    """
    codes = take_matrix(tensors, "weight", dtype, "[N, K]")
    tile = [size or whole for size, whole in zip(block, codes.shape, strict=True)]
    how = {"codes": "weight", "scale": scale, "zero_point": "", "block": tile, "reciprocal": False}
    return read(tensors, how)


def grid_shape(N: int, K: int, block: tuple[int, int]) -> tuple[int, int]:
    """Return the shape of the grid of scales for an [N, K] weight."""
    return -(-N // block[0]), -(-K // block[1])


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


def scales_for(largest: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the scales that make the largest magnitudes the largest code, float32.

    No clamping is needed afterwards: they are exact to half a unit in the last place, so that no
    quotient rounds past the largest code.
    """
    return divided(largest.float(), LARGEST_CODE[dtype]).clamp_(min=_SMALLEST_SCALE)


def encode(scaled: torch.Tensor, codes: torch.Tensor) -> None:
    """Round to the nearest code, ties to even; a float32 chunk, overwritten, to its codes."""
    codes.copy_(scaled if codes.dtype.is_floating_point else scaled.round_())


def quantize_blocks(weight: torch.Tensor, block: Sequence[int], dtype: torch.dtype) -> TensorDict:
    """Scale every tile of a weight so that its largest magnitude is the largest code; encode it.

    Args:
        weight: [N, K], floating point; not modified.
        block: [block_n, block_k].
        dtype: of the codes.
    Returns:
        "weight" [N, K] of `dtype`, "weight_scale_inv" float32 [ceil(N/bn), ceil(K/bk)],
        weight ~= q * scale_inv.
    Raises:
        ShapeError: not a matrix of floats, or not finite.
    """
    weight_shape(weight)
    block_n, block_k = block
    make = _compiled_tiles if is_compiled(weight) else _blocks
    codes, scales = make(weight, (block_n, block_k), dtype)
    require_finite(scales, weight)
    return {"weight": codes, "weight_scale_inv": scales}


def _compiled_tiles(
    weight: torch.Tensor, block: tuple[int, int], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [N, K] and scales [ceil(N/bn), ceil(K/bk)] of any tiles."""
    from mixedprec_plugin.quantize import compiled

    codes = empty(weight.shape, dtype)
    scales = scales_for(compiled.tops(weight, block), dtype)
    compiled.encode(weight, scales, block, codes)
    return codes, scales


def _blocks(
    weight: torch.Tensor, block: tuple[int, int], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of small tiles."""
    (N, K), (block_n, block_k) = weight.shape, block
    codes = empty((N, K), dtype, weight.device)
    scales = torch.empty(grid_shape(N, K, block), device=weight.device)
    for rows, columns, values in float_block_chunks(weight, block_n, block_k):
        tops = torch.maximum(values.amax(0), -values.amin(0))
        ragged = -len(tops) % block_k
        tops = torch.nn.functional.pad(tops, (0, ragged)).view(-1, block_k).amax(1)
        scale = scales_for(tops, dtype)
        first = columns.start // block_k
        scales[rows.start // block_n, first : first + len(scale)] = scale
        spread = scale.repeat_interleave(block_k)[: values.shape[1]]
        encode(values.div_(spread), codes[rows, columns])
    return codes, scales


def quantize_channels(weight: torch.Tensor, dtype: torch.dtype) -> TensorDict:
    """Scale every row of a weight so that its largest magnitude is the largest code; encode it.

    Args:
        weight: [N, K], floating point; not modified.
        dtype: of the codes.
    Returns:
        "weight" [N, K] of `dtype`, "weight_scale" float32 [N, 1], weight ~= q * scale.
    Raises:
        ShapeError: not a matrix of floats, or not finite.
    """
    _, K = weight_shape(weight)
    make = _compiled_tiles if is_compiled(weight) else _channels
    codes, scales = make(weight, (1, K), dtype)
    require_finite(scales, weight)
    return {"weight": codes, "weight_scale": scales}


def _channels(
    weight: torch.Tensor, _block: tuple[int, int], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [N, K] and scales [N, 1]."""
    codes = empty(weight.shape, dtype, weight.device)
    scales = torch.empty((len(weight), 1), device=weight.device)
    for rows, values in float_chunks(weight):
        # `aminmax` takes six times as long along a dimension
        tops = torch.maximum(values.amax(1, keepdim=True), -values.amin(1, keepdim=True))
        scales[rows] = scales_for(tops, dtype)
        encode(values.div_(scales[rows]), codes[rows])
    return codes, scales


def quantize_whole(weight: torch.Tensor, dtype: torch.dtype) -> TensorDict:
    """Scale a weight so that its largest magnitude is the largest code; encode it.

    Args:
        weight: [N, K], floating point; not modified.
        dtype: of the codes.
    Returns:
        "weight" [N, K] of `dtype`, "weight_scale" float32 [], weight ~= q * scale.
    Raises:
        ShapeError: not a matrix of floats, or not finite.
    """
    N, K = weight_shape(weight)
    make = _compiled_tiles if is_compiled(weight) else _whole
    codes, scale = make(weight, (N, K), dtype)
    require_finite(scale, weight)
    return {"weight": codes, "weight_scale": scale.view(())}


def _whole(
    weight: torch.Tensor, _block: tuple[int, int], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [N, K] and a scale."""
    low, high = torch.aminmax(weight)
    scale = scales_for(torch.maximum(high, -low), dtype)
    codes = empty(weight.shape, dtype, weight.device)
    for rows, values in float_chunks(weight):
        encode(values.div_(scale), codes[rows])
    return codes, scale


def write_channels(numbers: Numbers) -> TensorDict:
    """Store codes as they are, with a scale a row: one scale for all becomes every row's."""
    assert isinstance(numbers, Scaled)
    scales = numbers.scales.expand(numbers.codes.shape[0], 1).contiguous()
    return {"weight": numbers.codes, "weight_scale": scales}


def decode_e4m3(codes: torch.Tensor, values: torch.Tensor) -> None:
    """Write e4m3 codes as floats, four times as fast as torch's own cast on a CPU.

    The seven bits below the sign, moved up by seven, are a float16 of 1/256 the value: e4m3's
    exponent is biased by 7, float16's by 15. Only e4m3's NaN would read as a number.
    """
    octets = codes.view(torch.int8)
    if bool(octets.bitwise_and(0x7F).amax() == 0x7F):
        values.copy_(codes)
        return
    halves = octets.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)
    values.copy_(halves.view(torch.float16)).mul_(256)
