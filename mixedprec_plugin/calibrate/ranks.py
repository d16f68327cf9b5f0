"""Several processes that calibrate one model: each has some windows of the text, and some layers.

Started by torchrun; a single process is rank 0 of 1. Tokens go to the rank that rounds a layer, in
the order of their windows, so that it rounds what a single process would.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import distributed

from mixedprec_plugin.calibrate.capture import Seen, joined


class Ranks:
    """This process among those of torchrun: its number, how many there are, and its device."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self.device)
        if self.count > 1 and not distributed.is_initialized():
            distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def windows(self, num_windows: int) -> slice:
        """The windows of the text that are its own; there are some for each rank."""
        first, stop = (num_windows * rank // self.count for rank in (self.rank, self.rank + 1))
        return slice(first, stop)

    def share(self, value: Any) -> Any:
        """What rank 0 gives, on every rank."""
        if self.count == 1:
            return value
        held = [value]
        channel = self.device if self.device.type == "cuda" else None
        distributed.broadcast_object_list(held, device=channel)
        return held[0]

    def exchange(
        self, seen: dict[str, Seen], owners: Mapping[str, int], names: Sequence[str]
    ) -> dict[str, Seen]:
        """The tokens that all ranks have of layers, on the rank that owns each."""
        if self.count == 1:
            return seen
        mine = {}
        for name in names:
            own = seen.pop(name, None)
            pieces: list[Any] | None = [None] * self.count if owners[name] == self.rank else None
            distributed.gather_object(own, pieces, dst=owners[name])
            if parts := [piece for piece in pieces or () if piece is not None]:
                mine[name] = joined(parts)
        return mine

    def everyone(self, value: Any) -> list[Any]:
        """What each rank gives, in their order, on every rank; all wait for the last."""
        if self.count == 1:
            return [value]
        held = [None] * self.count
        distributed.all_gather_object(held, value)
        return held
