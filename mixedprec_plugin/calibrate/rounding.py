"""One layer: what it saw of the text -> its codes."""

from __future__ import annotations

from typing import Any

import torch

from mixedprec_plugin.calibrate.capture import Seen
from mixedprec_plugin.calibrate.moments import second_moment
from mixedprec_plugin.checkpoint.reader import TORCH_DTYPES, Reader
from mixedprec_plugin.compose.stream import compose_floats
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.methods.registry import METHODS
from mixedprec_plugin.plan.model import PlannedLayer
from mixedprec_plugin.quantize.checks import resolve_group_size
from mixedprec_plugin.quantize.codec import load_codec
from mixedprec_plugin.quantize.feedback import round_with_feedback
from mixedprec_plugin.quantize.integers import Integers

# above, a layer's inputs are taken in blocks between which nothing is fed back
_MAX_INPUTS = 16384


def is_rounded_so(layer: PlannedLayer) -> bool:
    """Whether a plan rounds a layer to integers in groups, which calibration does better."""
    if layer.scheme is None or layer.action not in ("quantize", "requantize"):
        return False
    return hasattr(load_codec(METHODS[layer.method].codec), "grid")


class LayerRounding:
    """Rounds layers of a plan by what they saw; see `sweep.Rounding`.

    Args:
        target: what the plan was made for.
        reader: reads the sources.
        device: where it computes.
    """

    def __init__(self, target: Target, reader: Reader, device: torch.device) -> None:
        self._target, self._reader, self._device = target, reader, device

    def __call__(
        self, layer: PlannedLayer, seen: Seen, num_tokens: int
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Round a layer.

        Args:
            num_tokens: of the whole text.
        Returns:
            the tensors of its method; and its record: "loss" in nats a token, "tokens" that it saw,
            how far correlations were shrunk, and in how many blocks.
        """
        assert layer.scheme is not None
        codec, dtype = load_codec(METHODS[layer.method].codec), TORCH_DTYPES[self._target.dtype]
        arguments = layer.scheme.arguments
        weight = compose_floats(layer, self._target, self._reader)["weight"].to(dtype).float()
        N, K = weight.shape
        group_size = resolve_group_size(K, arguments["group_size"], pack_factor=1)
        grid = codec.grid(arguments, dtype)
        x = torch.cat(seen.x) if seen.x else torch.ones(0, K)
        weights = torch.cat(seen.weights) if seen.x else torch.ones(0)
        weight = weight.to(self._device)
        pieces, loss, shrunk = [], 0.0, []
        blocks = _blocks(K, group_size)
        for columns in blocks:
            H, amount = self._moment(x[:, columns], weights, columns)
            piece = round_with_feedback(weight[:, columns], H, group_size, grid)
            pieces.append(piece)
            loss += 0.5 * piece.loss * len(x) / num_tokens
            shrunk.append(round(amount, 4))
        codes = torch.cat([piece.codes for piece in pieces], 1).cpu()
        zeros, scales = (
            torch.cat([getattr(piece, key) for piece in pieces], 1).cpu()
            for key in ("zeros", "scales")
        )
        numbers = Integers(N, K, group_size, lambda rows: codes[rows], zeros, scales.to(dtype))
        record: dict[str, Any] = {"loss": loss, "tokens": len(x), "shrunk": shrunk}
        return codec.write(numbers, arguments, dtype), record

    def _moment(
        self, x: torch.Tensor, weights: torch.Tensor, columns: slice
    ) -> tuple[torch.Tensor, float]:
        size = columns.stop - columns.start
        if len(x) == 0 or not float(weights.sum()) > 0:
            return torch.eye(size, device=self._device), 1.0
        return second_moment(x.to(self._device), weights.to(self._device))


def _blocks(K: int, group_size: int) -> list[slice]:
    """Cut input features into blocks of whole groups, as few and as even as may be."""
    groups = K // group_size
    count = -(-K // _MAX_INPUTS)
    size = -(-groups // count) * group_size
    return [slice(first, min(first + size, K)) for first in range(0, K, size)]
