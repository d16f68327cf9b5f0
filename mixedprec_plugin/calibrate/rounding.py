"""What layers saw of the text -> their codes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from mixedprec_plugin.calibrate.capture import Held, Seen, joined
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
# of so many rows, one tells what scales cost
_ROWS = 4


def is_rounded_so(layer: PlannedLayer) -> bool:
    """Whether a plan rounds a layer to codes with scales, which calibration does better."""
    if layer.scheme is None or layer.action not in ("quantize", "requantize"):
        return False
    return hasattr(load_codec(METHODS[layer.method].codec), "grid")


class Scales(NamedTuple):
    """What rows [N] and columns [K] of a weight are multiplied by before it is rounded."""

    rows: torch.Tensor
    columns: torch.Tensor


class LayerRounding:
    """Rounds layers of a plan by what they saw; see `sweep.Rounding`."""

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
            loss = held_loss(held.pop(layer.name, []), errors, num_held)
            yield layer, tensors, {"loss": loss, **record}

    def moments(
        self, layers: Sequence[PlannedLayer], seen: dict[str, Seen]
    ) -> Iterator[tuple[PlannedLayer, Moments]]:
        """Yield the moments of layers, each for as long as it is looked at; `seen` is emptied."""
        pools = self._pools(layers, seen)
        for layer in layers:
            x, weights = _cat(seen.pop(layer.name, Seen([], [], [])))
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
            x, weights = _cat(joined(seen[x.name] for x in experts if x.name in seen))
            if len(x):
                H, _ = second_moment(x.to(self._device), tempered(weights).to(self._device))
                pools[pool] = H.mul_(len(x) / len(experts))
        return pools

    def round(
        self, layer: PlannedLayer, moments: Moments, scales: Scales | None = None
    ) -> tuple[Tensors, torch.Tensor, Record]:
        """Round one layer to the tensors of its method.

        Args:
            scales: multiply the weight before; its errors are told without them.
        Returns:
            the tensors, its bias among them where its rows are scaled; its errors [N, K]; what is
            recorded.
        """
        assert layer.scheme is not None
        floats = compose_floats(layer, self._target, self._reader)
        pieces, shrunk = self._pieces(layer, floats["weight"], moments, scales, 1)
        errors = torch.cat([piece.errors for piece in pieces], 1)
        numbers = _numbers(pieces, *self.grid(layer, errors.shape[1]))
        record = {"tokens": moments.num_tokens, "shrunk": shrunk}
        codec = load_codec(METHODS[layer.method].codec)
        tensors = codec.write(numbers, layer.scheme.arguments, TORCH_DTYPES[self._target.dtype])
        if scales is not None:
            errors = errors / scales.rows[:, None] / scales.columns
            if "bias" in layer.outputs:
                tensors = {**tensors, "bias": floats["bias"].float() * scales.rows.cpu()}
        return tensors, errors, record

    def loss(self, layer: PlannedLayer, moments: Moments, scales: Scales) -> float:
        """What rounding some rows of a layer costs by H; of all, where rows share scales."""
        weight = compose_floats(layer, self._target, self._reader)["weight"]
        grid, _ = self.grid(layer, weight.shape[1])
        step = _ROWS if grid.rows == 1 else 1
        pieces, _ = self._pieces(layer, weight, moments, scales, step)
        losses = sum(piece.losses for piece in pieces)
        return float((losses / scales.rows[::step].double().square()).sum())

    def grid(self, layer: PlannedLayer, K: int) -> tuple[AnyGrid, int]:
        """What the codes of a layer stand for, and how many columns share a scale."""
        assert layer.scheme is not None
        arguments = layer.scheme.arguments
        codec = load_codec(METHODS[layer.method].codec)
        grid: AnyGrid = codec.grid(arguments, TORCH_DTYPES[self._target.dtype])
        if isinstance(grid, Tiles):
            return grid, grid.columns or K
        return grid, resolve_group_size(K, arguments["group_size"], pack_factor=1)

    def _pieces(
        self, layer: PlannedLayer, weight: torch.Tensor, moments: Moments, scales: Scales | None,
        step: int,
    ) -> tuple[list[Rounded], list[float]]:  # fmt: skip
        """Some rows of a weight, rounded block by block; how far each one's H is shrunk."""
        weight = weight[::step].to(TORCH_DTYPES[self._target.dtype]).float().to(self._device)
        if scales is not None:
            weight = weight * scales.rows[::step, None] * scales.columns
        grid, group_size = self.grid(layer, weight.shape[1])
        pieces, shrunk = [], []
        for columns in _blocks(weight.shape[1], group_size):
            H, amount = moments.of(columns)
            if scales is not None:
                H = H / scales.columns[columns] / scales.columns[columns, None]
            pieces.append(round_with_feedback(weight[:, columns], H, group_size, grid))
            shrunk.append(round(amount, 4))
        return pieces, shrunk


class Moments:
    """H of a layer, made once for each block of its inputs.

    Args:
        x, weights: what it saw, [T, K] and [T].
        pool: what experts borrow, [K, K], of tempered weights; None for others.
    """

    def __init__(self, x: torch.Tensor, weights: torch.Tensor, pool: torch.Tensor | None) -> None:
        self._x, self._weights, self._pool = x, weights, pool
        # first column -> H, how far it was shrunk
        self._known: dict[int, tuple[torch.Tensor, float]] = {}
        self.num_tokens = len(x)

    def of(self, columns: slice) -> tuple[torch.Tensor, float]:
        """The sum of w x x' over tokens, and by how much its correlations were shrunk."""
        if columns.start not in self._known:
            weights = tempered(self._weights)
            made = _moment(self._x[:, columns], weights, columns, self._pool)
            self._known[columns.start] = made
        return self._known[columns.start]

    @property
    def diagonal(self) -> torch.Tensor:
        """The diagonals of all blocks that were made, float32 [K]."""
        return torch.cat([self._known[first][0].diagonal() for first in sorted(self._known)])


def _cat(seen: Seen) -> tuple[torch.Tensor, torch.Tensor]:
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


def held_loss(held: Sequence[Held], errors: torch.Tensor, num_tokens: int) -> float | None:
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


def _numbers(pieces: Sequence[Rounded], grid: AnyGrid, group_size: int) -> Numbers:
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
