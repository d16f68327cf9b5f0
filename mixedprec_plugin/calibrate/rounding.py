"""What layers saw of the text -> their codes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from mixedprec_plugin.calibrate.capture import Held, Seen
from mixedprec_plugin.calibrate.moments import nats, second_moment, tempered
from mixedprec_plugin.calibrate.sweep import unit_of
from mixedprec_plugin.checkpoint.reader import TORCH_DTYPES, Reader
from mixedprec_plugin.compose.stream import Tensors, compose_floats
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.methods.registry import METHODS
from mixedprec_plugin.plan.model import PlannedLayer
from mixedprec_plugin.quantize.checks import resolve_group_size
from mixedprec_plugin.quantize.codec import Numbers, load_codec
from mixedprec_plugin.quantize.feedback import AnyGrid, Rounded, round_with_feedback
from mixedprec_plugin.quantize.integers import Integers
from mixedprec_plugin.quantize.rounding import Tiles
from mixedprec_plugin.quantize.scaled import Scaled

Record = dict[str, Any]

# above, a layer's inputs are taken in blocks between which nothing is fed back
_MAX_INPUTS = 16384


def is_rounded_so(layer: PlannedLayer) -> bool:
    """Whether a plan rounds a layer to codes with scales, which calibration does better."""
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
        self, layers: Sequence[PlannedLayer], seen: dict[str, Seen], num_held: int
    ) -> Iterator[tuple[PlannedLayer, Tensors, Record]]:
        """Round the layers of a decoder layer.

        Args:
            seen: layer name -> tokens, each taken out once it was used.
            num_held: tokens of the text that is held out.
        Yields:
            the tensors of each one's method, and its record: "loss" in nats a token of the text
            that is held out, None without it or gradients; "tokens" that it saw of the other; how
            far correlations were shrunk in each block of its inputs.
        """
        held = {name: one.held for name, one in seen.items()}
        for layer, moments in self.moments(layers, seen):
            tensors, errors, record = self.round(layer, moments)
            loss = _loss(held.pop(layer.name, []), errors, num_held)
            yield layer, tensors, {"loss": loss, **record}

    def moments(
        self, layers: Sequence[PlannedLayer], seen: dict[str, Seen]
    ) -> Iterator[tuple[PlannedLayer, Moments]]:
        """Yield the moments of the layers of a decoder layer, each for as long as it is looked at.

        Args:
            seen: layer name -> tokens, each taken out once it was used.
        """
        pools = self._pools(layers, seen)
        for layer in layers:
            x, weights = _joined(seen.pop(layer.name, Seen([], [], [])))
            pool = pools.get(unit_of(layer))
            yield layer, Moments(x.to(self._device), weights.to(self._device), pool)

    def _pools(
        self, layers: Sequence[PlannedLayer], seen: Mapping[str, Seen]
    ) -> dict[object, torch.Tensor]:
        """Of experts that read the same states: the mean over experts of the sum of w x x'."""
        members: dict[object, list[PlannedLayer]] = {}
        for layer in layers:
            if unit_of(layer) != layer.name:
                members.setdefault(unit_of(layer), []).append(layer)
        pools = {}
        for pool, experts in members.items():
            tokens = [seen[layer.name] for layer in experts if layer.name in seen]
            x, weights = _joined(
                Seen(
                    [x for one in tokens for x in one.x],
                    [w for one in tokens for w in one.weights],
                    [],
                )
            )
            if len(x):
                H, _ = second_moment(x.to(self._device), tempered(weights).to(self._device))
                pools[pool] = H.mul_(len(x) / len(experts))
        return pools

    def round(self, layer: PlannedLayer, moments: Moments) -> tuple[Tensors, torch.Tensor, Record]:
        """Round one layer to the tensors of its method; its errors [N, K]; what is recorded."""
        assert layer.scheme is not None
        codec, dtype = load_codec(METHODS[layer.method].codec), TORCH_DTYPES[self._target.dtype]
        arguments = layer.scheme.arguments
        weight = compose_floats(layer, self._target, self._reader)["weight"].to(dtype).float()
        weight = weight.to(self._device)
        K, grid = weight.shape[1], codec.grid(arguments, dtype)
        if isinstance(grid, Tiles):
            group_size = grid.columns or K
        else:
            group_size = resolve_group_size(K, arguments["group_size"], pack_factor=1)
        pieces, shrunk = [], []
        for columns in _blocks(K, group_size):
            H, amount = moments.of(columns)
            pieces.append(round_with_feedback(weight[:, columns], H, group_size, grid))
            shrunk.append(round(amount, 4))
        numbers = _numbers(pieces, group_size, grid)
        errors = torch.cat([piece.errors for piece in pieces], 1)
        record = {"tokens": moments.num_tokens, "shrunk": shrunk}
        return codec.write(numbers, arguments, dtype), errors, record


class Moments:
    """H of a layer, made once for each block of its inputs.

    Args:
        x, weights: what it saw, [T, K] and [T].
        pool: what experts borrow, [K, K], of tempered weights; None for others.
    """

    def __init__(self, x: torch.Tensor, weights: torch.Tensor, pool: torch.Tensor | None) -> None:
        self._x, self._weights, self._pool = x, weights, pool
        self._known: dict[tuple[int, int], tuple[torch.Tensor, float]] = {}
        self.num_tokens = len(x)

    def of(self, columns: slice) -> tuple[torch.Tensor, float]:
        """The sum of w x x' over tokens, and by how much its correlations were shrunk."""
        key = (columns.start, columns.stop)
        if key not in self._known:
            weights = tempered(self._weights)
            self._known[key] = _moment(self._x[:, columns], weights, columns, self._pool)
        return self._known[key]


def _joined(seen: Seen) -> tuple[torch.Tensor, torch.Tensor]:
    if not seen.x:
        return torch.empty(0, 0), torch.empty(0)
    return torch.cat(seen.x), torch.cat(seen.weights)


def _moment(
    x: torch.Tensor, weights: torch.Tensor, columns: slice, pool: torch.Tensor | None
) -> tuple[torch.Tensor, float]:
    """Sum of w x x', its correlations shrunk, and by how much they were.

    An expert borrows from all others where it saw few tokens for its number of inputs. One that saw
    none, and can borrow from none, is rounded as if its inputs were independent and alike.
    """
    count, size = len(x), columns.stop - columns.start
    if count and float(weights.sum()) > 0:
        H, amount = second_moment(x, weights)
        H.mul_(count)
    else:
        H, amount = torch.zeros(size, size, device=x.device), 1.0
    if pool is not None:
        few = size / 4
        H.add_(pool[columns, columns], alpha=few / (few + count))
        return H, 0.0
    return (H, amount) if float(H.diagonal().sum()) > 0 else (H.fill_diagonal_(1), 1.0)


def _loss(held: Sequence[Held], errors: torch.Tensor, num_tokens: int) -> float | None:
    """What errors of a weight [N, K] cost, in nats a token of those that are held out.

    By the gradient that each has, as if errors of different layers were independent; None without
    gradients, or tokens.
    """
    if not num_tokens:
        return None
    total = 0.0
    for one in held:
        if one.gradients is None:
            return None
        pulled = one.gradients.to(errors) @ errors
        total += float(nats((pulled * one.x.to(errors)).sum(1)).sum(dtype=torch.float64))
    return total / num_tokens


def _numbers(pieces: Sequence[Rounded], group_size: int, grid: AnyGrid) -> Numbers:
    """Blocks of inputs as one weight, on the CPU."""
    # of float8, torch puts no pieces together but bytes
    codes = torch.cat([piece.codes.view(torch.uint8) for piece in pieces], 1).cpu()
    scales, zeros = (
        torch.cat([getattr(piece, key) for piece in pieces], 1).cpu() for key in ("scales", "zeros")
    )
    N, K = codes.shape
    if isinstance(grid, Tiles):
        rows = grid.rows or N
        return Scaled(codes.view(grid.dtype), scales[::rows].contiguous(), (rows, group_size))
    return Integers(N, K, group_size, lambda rows: codes[rows], zeros, scales.to(grid.scale_dtype))


def _blocks(K: int, group_size: int) -> list[slice]:
    """Cut input features into blocks of whole groups, as few and as even as may be."""
    groups = -(-K // group_size)
    count = -(-K // _MAX_INPUTS)
    size = -(-groups // count) * group_size
    return [slice(first, min(first + size, K)) for first in range(0, K, size)]
