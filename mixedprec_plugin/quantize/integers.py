"""Integers in groups along K, W = (q - zero) * scale, in whatever packing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from mixedprec_plugin.quantize.checks import refuse
from mixedprec_plugin.quantize.chunks import row_chunks
from mixedprec_plugin.quantize.codec import NotTheSameNumbersError


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
            ShapeError: it names a group that is not there.
        """
        if self.g_idx is None:
            return None
        plain = plain_order(self.K, self.group_size, self.g_idx.device)
        if torch.equal(self.g_idx.int(), plain):
            return None
        low, high = int(self.g_idx.min()), int(self.g_idx.max())
        num_groups = self.K // self.group_size
        if low < 0 or high >= num_groups:
            refuse(
                self.order_suffix,
                f"groups {low}..{high} (expected 0..{num_groups - 1})",
                "check group_size against the checkpoint",
                "g-idx",
            )
        return self.g_idx.long()

    def dequantize(self) -> torch.Tensor:
        """Return float32 [N, K], exactly (q - zero) * scale.

        Raises:
            ShapeError: as `order`.
        """
        order, zeros, scales = self.order, self.zeros.float(), self.scales.float()
        weight = torch.empty((self.N, self.K), device=scales.device)
        # whole words, in every packing
        for rows in row_chunks(self.N, self.K, multiple=8):
            chunk = weight[rows].copy_(self.codes(rows))
            if order is None:
                grouped = chunk.view(len(chunk), -1, self.group_size)
                grouped.sub_(zeros[rows, :, None]).mul_(scales[rows, :, None])
            else:
                chunk.sub_(zeros[rows][:, order]).mul_(scales[rows][:, order])
        return weight

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
                raise NotTheSameNumbersError(
                    f"{wrong:,} of its {made.numel():,} scales are no float16 numbers",
                    "start with --dtype bfloat16",
                )
        return made.t().contiguous()


def plain_order(K: int, group_size: int, device: torch.device | None = None) -> torch.Tensor:
    """Return int32 [K], the group of every input feature when groups are in order."""
    return torch.arange(K, dtype=torch.int32, device=device) // group_size
