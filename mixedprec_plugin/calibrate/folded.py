"""Rounding with scales folded between layers, where that loses less.

    f = rms^e, its geometric mean 1, within 1/16 to 16

rms is of a unit's inputs, weighed as for H, of all its readers; e is searched for each unit by the
loss of some of the readers' rows. Columns that are read loudly get finer codes for their size. A
norm is served in the model's dtype: columns are multiplied by what it was divided by there, so that
nothing but float32's rounding is lost. A unit whose layers then cost no less together, on text that
is held out, stays as it was; without gradients the loss by H tells.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch

from mixedprec_plugin.calibrate.capture import Seen
from mixedprec_plugin.calibrate.folds import Folds, Unit, layers_of
from mixedprec_plugin.calibrate.rounding import LayerRounding, Moments, Record, Scales, held_loss
from mixedprec_plugin.checkpoint.reader import TORCH_DTYPES, Reader
from mixedprec_plugin.compose.stream import Tensors, compose_floats
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.plan.model import PlannedLayer

Made: TypeAlias = tuple[PlannedLayer, Tensors, Record]

EXPONENTS = (0.0, 0.125, 0.25, 0.375, 0.5)
_LARGEST = 16.0


class FoldedRounding(LayerRounding):
    """Rounds layers of a plan, scales folded; `groups` has the number of each layer's group."""

    def __init__(self, target: Target, reader: Reader, device: torch.device, folds: Folds) -> None:
        super().__init__(target, reader, device)
        self._folds = folds
        self.groups = {
            layer.name: number
            for number, group in enumerate(folds.groups)
            for layer in layers_of(group)
        }

    def __call__(
        self, layers: Sequence[PlannedLayer], seen: dict[str, Seen], num_held: int
    ) -> Iterator[Made]:
        """Round the layers of a decoder layer; see `LayerRounding`.

        Yields:
            what others are divided for, too: the tensors of a norm, none of a layer whose rows are
            scaled, with "exponent" alone.
        """
        numbers = [self.groups[layer.name] for layer in layers if layer.name in self.groups]
        for number in dict.fromkeys(numbers):
            yield from self._round_group(self._folds.groups[number], seen, num_held)
        alone = [layer for layer in layers if layer.name not in self.groups]
        yield from super().__call__(alone, seen, num_held)

    def _round_group(
        self, group: Sequence[Unit], seen: dict[str, Seen], num_held: int
    ) -> list[Made]:
        layers = layers_of(group)
        held = {layer.name: seen[layer.name].held for layer in layers}
        moments = {layer.name: found for layer, found in self.moments(layers, seen)}
        scales = {layer.name: self._no_scales(layer) for layer in layers}

        def rounded(layer: PlannedLayer, by: Mapping[str, Scales]) -> Made:
            tensors, errors, record = self.round(layer, moments[layer.name], by[layer.name])
            loss = held_loss(held[layer.name], errors, num_held)
            return layer, tensors, {"loss": loss, **record}

        def cost(made: Iterable[Made], by: Mapping[str, Scales]) -> float:
            return math.fsum(
                self.loss(layer, moments[layer.name], by[layer.name])
                if record["loss"] is None
                else record["loss"]
                for layer, _, record in made
            )

        # first: it makes the moments
        best = {layer.name: rounded(layer, scales) for layer in layers}
        divided: list[Made] = []
        for unit in group:
            exponent, new, tensors = self._search(unit, moments, scales)
            if exponent:
                made = {layer.name: rounded(layer, new) for layer in layers_of([unit])}
                if cost(made.values(), new) < cost((best[name] for name in made), scales):
                    best, scales = {**best, **made}, new
                    divided.append((unit.maker, tensors, {"exponent": exponent}))
        return [*best.values(), *divided]

    def _no_scales(self, layer: PlannedLayer) -> Scales:
        assert layer.stored is not None
        N, K = layer.stored.N, layer.stored.K
        return Scales(torch.ones(N, device=self._device), torch.ones(K, device=self._device))

    def _search(
        self, unit: Unit, moments: Mapping[str, Moments], scales: Mapping[str, Scales]
    ) -> tuple[float, dict[str, Scales], Tensors]:
        """Choose an exponent: with it the scales of all layers, and the tensors of a norm."""
        diagonals = [moments[reader.name].diagonal for reader in unit.readers]
        squares = torch.stack(diagonals).sum(0, dtype=torch.float64).cpu()
        tried = []
        for exponent in EXPONENTS:
            new, tensors = self._divide(unit, factors(squares, exponent, unit), scales)
            losses = [self.loss(x, moments[x.name], new[x.name]) for x in unit.readers]
            tried.append((math.fsum(losses), exponent, new, tensors))
        _, exponent, new, tensors = min(tried, key=lambda one: one[:2])
        return exponent, new, tensors

    def _divide(
        self, unit: Unit, by: torch.Tensor, scales: Mapping[str, Scales]
    ) -> tuple[dict[str, Scales], Tensors]:
        """Fold factors of what the maker makes: the scales of all layers, the tensors of a norm."""
        maker, (reader, *_) = unit.maker, unit.readers
        new, tensors = dict(scales), {}
        if maker.kind == "norm":
            weight = compose_floats(maker, self._target, self._reader)["weight"]
            tensors["weight"], by = divided_norm(
                weight.to(TORCH_DTYPES[maker.outputs["weight"].dtype]), by, self._folds.offset
            )
        else:
            rows = by.reciprocal().float().to(self._device)
            new[maker.name] = new[maker.name]._replace(rows=rows)
        K = len(scales[reader.name].columns)
        heads = by.view(unit.num_heads, 1, -1)
        columns = heads.expand(-1, K // len(by), -1).flatten().float().to(self._device)
        for each in unit.readers:
            new[each.name] = new[each.name]._replace(columns=columns)
        return new, tensors


def factors(squares: torch.Tensor, exponent: float, unit: Unit) -> torch.Tensor:
    """What a unit's columns are multiplied by, for each output of its maker, float64.

    Args:
        squares: of its inputs, float64 [K], of which several query heads may read one number.
    """
    maker = unit.maker.stored
    size = maker.N if maker is not None else len(squares)
    squares = squares.view(unit.num_heads, len(squares) // size, -1).sum(1).flatten()
    logarithms = (squares / squares.mean()).clamp(min=1e-12).log() * (exponent / 2)
    return (logarithms - logarithms.mean()).exp().clamp(1 / _LARGEST, _LARGEST)


def divided_norm(
    weight: torch.Tensor, by: torch.Tensor, offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Divide a norm's weight [K], in the dtype that it is served in, by factors, float64 [K].

    Args:
        offset: what the norm adds to its weight.
    Returns:
        the weight, and what it was divided by, float64: 1 where it is zero, or would be.
    """
    before = weight.double() + offset
    made = (before / by - offset).to(weight.dtype)
    after = made.double() + offset
    is_divided = after.isfinite() & (after != 0) & (before != 0)
    return torch.where(is_divided, made, weight), torch.where(is_divided, before / after, 1.0)
