"""Quantizing a weight where its codes are going to be.

The weight goes to the device in pieces through two pinned buffers: while one is copied, the next is
read from the file into the other. The method's own code quantizes and packs it there, on tensors of
that device, and what a weight loader is handed lies there already. What is read in a part, goes in
a part.

Beside the model the device holds one weight at a time, `MAX_BYTES` at most, what is made of it, and
a few pieces of `quantize.chunks.CHUNK_BYTES` times `DEVICE_FACTOR` in float32: below 1.25 GiB
together. Larger weights are quantized on the CPU. What is dequantized or repacked is, too.
"""

from __future__ import annotations

import torch

from mixedprec_plugin.compose.stream import Tensors, round_to_nearest
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.plan.model import PlannedLayer

MAX_BYTES = 512 << 20
# of each of two buffers of the host's memory that a device reads by itself
_PIECE_BYTES = 16 << 20


class DeviceRounding:
    """Quantizes weights [N, K] on a device, each weight to the nearest code; a `Quantize`.

    Every operation is one that IEEE 754 rounds in one way, so that the codes are the CPU's.

    Attributes:
        num_bytes: of the weights that went there.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.num_bytes = 0
        self._buffers: list[tuple[torch.Tensor, torch.cuda.Event]] = []

    def __call__(self, layer: PlannedLayer, weight: torch.Tensor, target: Target) -> Tensors:
        """As `round_to_nearest`; what it makes lies on the device."""
        if weight.nbytes > MAX_BYTES:
            return round_to_nearest(layer, weight, target)
        with torch.device(self.device):
            return round_to_nearest(layer, self._moved(weight), target)

    def _moved(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight on the device; what copies it may still be under way."""
        self.num_bytes += weight.nbytes
        if self.device.type != "cuda":
            return weight.to(self.device)
        if not self._buffers:
            self._buffers = [
                (
                    torch.empty(_PIECE_BYTES, dtype=torch.uint8, device="cpu", pin_memory=True),
                    torch.cuda.Event(),  # type: ignore[no-untyped-call]
                )
                for _ in range(2)
            ]
        made = torch.empty_like(weight, device=self.device).view(-1)
        pieces = zip(
            made.split(_PIECE_BYTES // weight.itemsize),  # type: ignore[no-untyped-call]
            weight.reshape(-1).split(_PIECE_BYTES // weight.itemsize),  # type: ignore[no-untyped-call]
            strict=True,
        )
        for number, (there, here) in enumerate(pieces):
            buffer, is_copied = self._buffers[number % 2]
            is_copied.synchronize()
            pinned = buffer[: here.nbytes].view(here.dtype).copy_(here)
            there.copy_(pinned, non_blocking=True)
            is_copied.record()
        return made.view(weight.shape)
