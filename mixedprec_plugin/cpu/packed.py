"""Weights of 4 and 8 bits multiplied in the activation's dtype, as AWQ's and Marlin's kernels do.

They stay packed in the layouts of torch's kernels for CPUs. That of 4 bits depends on the CPU: rows
in blocks of 64 (AVX-512) or 32 (AVX2), K runs over a block's columns, a byte holds row r of the
block in its low nibble and row r + half in its high one. Which one this machine has is found by
packing; a machine that has another keeps the checkpoint's layout.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch.nn.functional import linear

# Group sizes that the kernel takes (aten/src/ATen/native/LinearAlgebra.cpp), the widest first.
_GROUP_SIZES = (256, 128, 64, 32)
# Up to so many tokens torch's kernels of 4 and of 8 bits are faster than dequantizing; measured by
# benchmarks/cpu_linear.py.
_INT4_TOKENS = 28
_INT8_TOKENS = 16
# Rows, a multiple of every block's, that are dequantized at once.
_WIDE_ROWS = 256
# Codes that are widened to int32 at once: 1 MiB.
_CHUNK = 1 << 18
# Flips the sign bit: code - 128 as int8.
_SIGN = 0x80


def dequantize(
    codes: torch.Tensor, zeros: torch.Tensor | int, scales: torch.Tensor
) -> torch.Tensor:
    """The weight that the kernels multiply by.

    Args:
        codes: uint8 or int8 [N, K].
        zeros: zero points, uint8 [N, K/G], or one for all.
        scales: [K/G, N], the dtype of the activations.
    Returns:
        [N, K]: (code - zero) * scale in the dtype of scales; the difference is exact, the product
        rounded once.
    Source:
        sglang/kernels/ops/quantization/awq_triton.py, awq_dequantize_kernel; for GPTQ the types
        uint4b8 and uint8b128 of GPTQMarlinConfig.TYPE_MAP.
    """
    num_groups, num_rows = scales.shape
    steps = codes.to(scales.dtype).view(num_rows, num_groups, -1)
    if isinstance(zeros, torch.Tensor):
        steps.sub_(zeros.to(scales.dtype).unsqueeze(2))
    elif zeros:
        steps.sub_(zeros)
    return steps.mul_(scales.t().unsqueeze(2)).view(num_rows, -1)


def multiply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply in the weight's dtype, accumulating in float32.

    Args:
        x: [T, K], the dtype of the weight.
        weight: [N, K].
    Returns:
        [T, N] in the dtype of x.
    """
    # Without AVX-512 torch multiplies 16-bit matrices one by one; float32 gives the same sums.
    if x.shape[0] > 1 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return linear(x.float(), weight.float()).to(x.dtype)
    return linear(x, weight)


@dataclasses.dataclass(frozen=True)
class Int4Weight:
    """A weight that is kept packed.

    Attributes:
        packed: uint8 [N, K/2].
        scales: bfloat16 [K/G, N].
        zeros: zero points, uint8 [N, K/G], or one for all.
        pairs: scales and offsets for the kernel, bfloat16 [K/g, N, 2]; g divides G.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | int
    pairs: torch.Tensor

    @classmethod
    def pack(
        cls,
        read: Callable[[slice], torch.Tensor],
        num_rows: int,
        num_columns: int,
        scales: torch.Tensor,
        zeros: torch.Tensor | int,
    ) -> Int4Weight | None:
        """Pack codes that are unpacked some rows at a time, so that they are never whole in memory.

        Args:
            read: rows -> codes, uint8 [rows, K]; the slices are multiples of 64 but the last.
        Returns:
            None where the kernel takes no such shape, dtype or group size.
        """
        group_size = num_columns // scales.shape[0]
        kernel_group = next((size for size in _GROUP_SIZES if group_size % size == 0), None)
        rows = block_rows()
        if scales.dtype != torch.bfloat16 or kernel_group is None or rows is None:
            return None
        if num_rows % rows:
            return None
        pairs = _pair(scales, zeros)
        if kernel_group == group_size:
            scales = pairs[..., 0]
        else:
            pairs = pairs.repeat_interleave(group_size // kernel_group, dim=0)
        return cls(_pack_rows(read, num_rows, num_columns), scales, zeros, pairs)

    def unpack(self) -> torch.Tensor:
        """The codes, uint8 [N, K]."""
        rows = block_rows()
        assert rows is not None
        return _unpack_blocks(self.packed, rows)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply [T, K] bfloat16 by the weight, [T, N].

        Few tokens go through torch's kernel. It computes the weight and sums in float32; CUDA's
        kernels round the weight, (q - z) * scale, to bfloat16, and this one rounds the offset,
        (8 - z) * scale. Many tokens are multiplied by the weight as CUDA rounds it.
        """
        if x.shape[0] > _INT4_TOKENS:
            return self._multiply_wide(x)
        group_size = x.shape[1] // self.pairs.shape[0]
        out: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.contiguous(), self.packed, group_size, self.pairs
        )
        return out

    def _multiply_wide(self, x: torch.Tensor) -> torch.Tensor:
        """Dequantize some rows after the other, in the cache, and multiply by them."""
        # numba, which a start needs for nothing else
        from mixedprec_plugin.cpu.widen import widen_int4

        (T, K), N, rows = x.shape, len(self.packed), block_rows()
        assert rows is not None
        out = torch.empty(T, N, dtype=x.dtype)
        buffer = torch.empty(K * min(_WIDE_ROWS, N), dtype=x.dtype)
        for start in range(0, N, _WIDE_ROWS):
            part = slice(start, min(start + _WIDE_ROWS, N))
            zeros = self.zeros[part] if isinstance(self.zeros, torch.Tensor) else self.zeros
            made = buffer[: K * (part.stop - start)].view(K, -1)
            weight = widen_int4(self.packed[part], zeros, self.scales[:, part], rows, made)
            out[:, part] = multiply(x, weight)
        return out


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
        if is_channelwise and x.shape[0] <= _INT8_TOKENS:
            return torch._weight_int8pack_mm(x.contiguous(), self.packed, self.scales[0])
        return multiply(x, dequantize(self.packed, 0, self.scales))


@functools.cache
def block_rows() -> int | None:
    """Rows of a block of this machine's layout; None if it is one that is not known here."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (128, 32), dtype=torch.uint8, generator=generator)
    packed = pack_int4(codes)
    matches = (rows for rows in (64, 32) if torch.equal(_unpack_blocks(packed, rows), codes))
    return next(matches, None)


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Pack codes, uint8 [N, K], each below 16, to uint8 [N, K/2]."""
    return _pack_rows(codes.__getitem__, *codes.shape)


def _pack_rows(
    read: Callable[[slice], torch.Tensor], num_rows: int, num_columns: int
) -> torch.Tensor:
    packed = torch.empty(num_rows, num_columns // 2, dtype=torch.uint8)
    # Blocks are independent of each other; 64 rows are whole blocks in every layout.
    step = max(_CHUNK // num_columns // 64, 1) * 64
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        packed[rows] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
            read(rows).to(torch.int32), 1
        )
    return packed


def _unpack_blocks(packed: torch.Tensor, rows: int) -> torch.Tensor:
    """uint8 [N, K/2] -> uint8 [N, K] for blocks of so many rows."""
    num_rows, num_columns = packed.shape[0], packed.shape[1] * 2
    octets = packed.view(num_rows // rows, num_columns, rows // 2)
    codes = torch.empty(num_rows // rows, 2, rows // 2, num_columns, dtype=torch.uint8)
    codes[:, 0] = (octets & 15).transpose(1, 2)
    codes[:, 1] = (octets >> 4).transpose(1, 2)
    return codes.view(num_rows, num_columns)


def _pair(scales: torch.Tensor, zeros: torch.Tensor | int) -> torch.Tensor:
    """[K/G, N, 2]: scale and offset, W = (q - 8) * scale + offset."""
    shift = 8 - (zeros.t().float() if isinstance(zeros, torch.Tensor) else zeros)
    return torch.stack((scales, (scales.float() * shift).to(scales.dtype)), dim=2)
