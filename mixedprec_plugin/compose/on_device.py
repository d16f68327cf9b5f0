"""Quantizing a weight where its codes are going to be.

The method's own code quantizes and packs it there, on tensors of that device, and what a weight
loader is handed lies there already. What is read in a part, goes in a part.

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


class DeviceRounding:
    """Quantizes weights [N, K] on a device, each weight to the nearest code; a `Quantize`.

    Every operation is one that IEEE 754 rounds in one way, so that the codes are the CPU's.

    Attributes:
        num_bytes: of the weights that went there.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.num_bytes = 0

    def __call__(self, layer: PlannedLayer, weight: torch.Tensor, target: Target) -> Tensors:
        """As `round_to_nearest`; what it makes lies on the device."""
        if weight.nbytes > MAX_BYTES:
            return round_to_nearest(layer, weight, target)
        self.num_bytes += weight.nbytes
        with torch.device(self.device):
            return round_to_nearest(layer, weight.to(self.device), target)
