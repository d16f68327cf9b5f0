"""Integers in groups along K, W = (q - zero) * scale, in whatever packing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import torch

from mixedprec_plugin.quantize.checks import (
    refuse,
    require_finite,
    require_packable,
    resolve_group_size,
    weight_shape,
)
from mixedprec_plugin.quantize.chunks import empty, float_chunks, is_compiled, row_chunks
from mixedprec_plugin.quantize.codec import Arguments, NotTheSameNumbersError, TensorDict
from mixedprec_plugin.quantize.rounding import Grid, round_groups

# as many rows fill words of 4 and of 8 bits, whichever way they run
WHOLE_WORDS = 8


@dataclasses.dataclass(frozen=True)
class Integers:
    """The numbers of a weight.

    Attributes:
        N, K: output and input features.
        group_size: elements along K that share a scale; divides K.
        codes: rows -> uint8 [rows, K].
        zeros: int16 [N, K/G].
        scales: [N, K/G], in the stored dtype.
        g_idx: int32 [K], the group of every input feature; None where groups are in order.
        order_suffix: what `g_idx` is stored as, for messages.
        keeps_order: whether the method whose packing it is serves another order of groups.
    """

    N: int
    K: int
    group_size: int
    codes: Callable[[slice], torch.Tensor]
    zeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor | None = None
    order_suffix: str = "g_idx"
    keeps_order: bool = False

    @property
    def order(self) -> torch.Tensor | None:
        """The group of every input feature, int64 [K]; None where groups are in order.

        Raises:
            ShapeError: it names a group that is not there, or groups are of several sizes.
        """
        if self.g_idx is None:
            return None
        plain = plain_order(self.K, self.group_size, self.g_idx.device)
        if torch.equal(self.g_idx.int(), plain):
            return None
        low, high = int(self.g_idx.min()), int(self.g_idx.max())
        num_groups = self.K // self.group_size
        if low < 0 or high >= num_groups:
            what = f"groups {low}..{high} (expected 0..{num_groups - 1})"
            refuse(self.order_suffix, what, "check group_size against the checkpoint", "g-idx")
        sizes = torch.bincount(self.g_idx.flatten().int(), minlength=num_groups)
        if bool((sizes != self.group_size).any()):
            least, most = int(sizes.min()), int(sizes.max())
            what = f"groups of {least} to {most} (expected {self.group_size})"
            refuse(self.order_suffix, what, "take the layer from another source", "g-idx")
        return self.g_idx.long()

    def dequantize(self) -> torch.Tensor:
        """Return float32 [N, K], exactly (q - zero) * scale; raises as `order` does."""
        order, zeros, scales = self.order, self.zeros.float(), self.scales.float()
        factor = torch.get_num_threads()
        weight = empty((self.N, self.K), torch.float32, scales.device)
        for rows in row_chunks(self.N, self.K, multiple=WHOLE_WORDS, factor=factor):
            codes = self.codes(rows)
            if is_compiled(codes, self.N * self.K):
                from mixedprec_plugin.quantize import compiled_decoding

                grids, made = (zeros[rows], scales[rows]), weight[rows]
                if order is None:
                    compiled_decoding.decode(codes, *grids, (1, self.group_size), made)
                else:
                    compiled_decoding.decode_in_order(codes, order, *grids, made)
                continue
            chunk = weight[rows].copy_(codes)
            if order is None:
                grouped = chunk.view(len(chunk), -1, self.group_size)
                grouped.sub_(zeros[rows, :, None]).mul_(scales[rows, :, None])
            else:
                chunk.sub_(zeros[rows][:, order]).mul_(scales[rows][:, order])
        return weight

    def require_symmetric(self, bits: int, method: str) -> None:
        """Check that each zero point is the middle of the range.

        Raises:
            NotTheSameNumbersError: one is not, and the method is served symmetric only.
        """
        middle = 1 << (bits - 1)
        odd = int((self.zeros != middle).sum())
        if odd:
            what = (
                f"{odd:,} of its {self.zeros.numel():,} zero points are not {middle}, and {method} "
                "is served symmetric only"
            )
            raise NotTheSameNumbersError(what, can_round=True)

    def scales_in(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the scales in the dtype that the model runs in, transposed: [K/G, N].

        bfloat16's range is float32's; float16's is not, at neither end.

        Raises:
            NotTheSameNumbersError: float16 does not hold them.
        """
        made = self.scales.to(dtype)
        if dtype == torch.float16 and self.scales.dtype != dtype:
            wrong = int((made.float() != self.scales.float()).sum())
            if wrong:
                what = f"{wrong:,} of its {made.numel():,} scales do not fit in float16"
                raise NotTheSameNumbersError(what, "start with --dtype bfloat16")
        return made.t().contiguous()


@dataclasses.dataclass(frozen=True)
class Words:
    """How codes lie in int32 words, "qweight" along N or K and "qzeros" along N.

    Attributes:
        bits: of a code.
        along_k: input features in a word of "qweight"; 1 where its words are along N.
        pack: codes uint8 [R, K] -> columns of "qweight".
        pack_zeros: zero points [R, K/G] -> [K/G, R * bits / 32], columns of "qzeros".
    """

    bits: int
    along_k: int
    pack: Callable[[torch.Tensor], torch.Tensor]
    pack_zeros: Callable[[torch.Tensor], torch.Tensor]

    def quantize(self, weight: torch.Tensor, arguments: Arguments, grid: Grid) -> TensorDict:
        """Round a weight to groups; "scales" [K/G, N] are beside the words.

        Args:
            arguments: "group_size" (divides K; -1 for all of K).
        Raises:
            ShapeError: not a matrix of floats, not finite, too large for the scales' dtype, K no
                multiple of the group size, or N or K no whole words.
        """
        N, K = weight_shape(weight)
        require_packable(N, 32 // self.bits)
        group_size = resolve_group_size(K, arguments["group_size"], self.along_k)
        scales = torch.empty((K // group_size, N), dtype=grid.scale_dtype, device=weight.device)

        def pieces() -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
            for rows, codes, scale, zeros in rounded(weight, group_size, grid):
                scales[:, rows] = scale.t()
                yield rows, codes, zeros

        made = self._packed(pieces(), K, scales)
        require_finite(scales, weight)
        return made

    def write(self, numbers: Integers, dtype: torch.dtype) -> TensorDict:
        """Store the same numbers; "scales" [K/G, N] of a dtype are beside the words.

        Raises:
            NotTheSameNumbersError: the dtype does not hold the scales.
        """
        chunks = row_chunks(numbers.N, numbers.K, multiple=WHOLE_WORDS)
        pieces = ((rows, numbers.codes(rows), numbers.zeros[rows]) for rows in chunks)
        return self._packed(pieces, numbers.K, numbers.scales_in(dtype))

    def _packed(
        self,
        pieces: Iterable[tuple[slice, torch.Tensor, torch.Tensor]],
        K: int,
        scales: torch.Tensor,
    ) -> TensorDict:
        """Pack the codes and zero points of some rows after the other."""
        num_groups, N = scales.shape
        along_n = 1 if self.along_k > 1 else 32 // self.bits
        shape = K // self.along_k, N // along_n
        qweight = empty(shape, torch.int32, scales.device)
        qzeros = empty((num_groups, N * self.bits // 32), torch.int32, scales.device)
        for rows, codes, zeros in pieces:
            if is_compiled(codes, num_weights=N * K):
                from mixedprec_plugin.quantize.compiled_packing import pack_columns

                place = rows.start // along_n
                pack_columns(codes, self.bits, qweight, place, along_k=self.along_k > 1)
            else:
                qweight[:, rows.start // along_n : rows.stop // along_n] = self.pack(codes)
            first, last = rows.start * self.bits // 32, rows.stop * self.bits // 32
            qzeros[:, first:last] = self.pack_zeros(zeros)
        return {"qweight": qweight, "qzeros": qzeros, "scales": scales}


def rounded(
    weight: torch.Tensor, group_size: int, grid: Grid
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """What `round_groups` makes of some rows of a weight [N, K] after the other.

    Yields:
        The slice of rows, codes, which are valid until the next step, scales and zero points.
    """
    if is_compiled(weight):
        from mixedprec_plugin.quantize.compiled import round_rows

        yield from round_rows(weight, group_size, grid, WHOLE_WORDS)
        return
    for rows, values in float_chunks(weight, multiple=WHOLE_WORDS):
        yield rows, *round_groups(values, group_size, grid)


def plain_order(K: int, group_size: int, device: torch.device | None = None) -> torch.Tensor:
    """Return int32 [K], the group of every input feature when groups are in order."""
    return torch.arange(K, dtype=torch.int32, device=device) // group_size
