"""What a log says while weights are read: how much of them, how fast, and the time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch

from mixedprec_plugin.compose.stream import VirtualCheckpoint
from mixedprec_plugin.plan.render import format_bytes

# seconds between two lines; a load that takes no longer has none
_EVERY = 5.0


def reported(
    stream: VirtualCheckpoint,
    say: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a virtual checkpoint, and say now and then how far it is."""
    left = {layer.name: len(layer.outputs) for layer in stream.layers}
    sizes = {layer.name: layer.bytes_before for layer in stream.layers}
    total = sum(sizes.values())
    num_layers = num_bytes = 0
    start = last = clock()
    for name, tensor in stream:
        yield name, tensor
        layer = name.rpartition(".")[0]
        left[layer] -= 1
        if left[layer]:
            continue
        num_layers, num_bytes = num_layers + 1, num_bytes + sizes[layer]
        now = clock()
        if now - last >= _EVERY and num_bytes and num_layers < len(sizes):
            last = now
            rate = num_bytes / (now - start)
            say(
                f"mixedprec: {num_layers} of {len(sizes)} layers, {format_bytes(num_bytes)} of "
                f"{format_bytes(total)}, {format_bytes(int(rate))}/s, "
                f"{(total - num_bytes) / rate:.0f} s left"
            )
