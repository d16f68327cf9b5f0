"""Forward and backward through a network, one decoder layer in memory at a time.

Forward keeps the hidden states in front of each decoder layer on disk. Labels are then drawn from
the model's own predictions, and the gradient of their loss goes backward; each decoder layer's
linear layers are rounded as it passes, and their weights are dropped. All statistics are those of
the unrounded model, so a sweep that was stopped goes on where it was.

States and gradients are float32 on disk, too. A first token's states may be a thousand times those
of others, and its gradient is nearly orthogonal to them: rounded to bfloat16 it no longer is, and
the layers that make such states multiply what is left by as much.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from mixedprec_plugin.calibrate.capture import Capture, Seen
from mixedprec_plugin.calibrate.network import Network
from mixedprec_plugin.calibrate.ranks import Ranks
from mixedprec_plugin.calibrate.text import draw
from mixedprec_plugin.cpu.heap import trim_heap
from mixedprec_plugin.errors import ConvertError, Problem
from mixedprec_plugin.families.names import ExpertShard
from mixedprec_plugin.plan.model import PlannedLayer

# for each batch and decoder layer, what this is called with beside its hidden states
Calls = list[list[tuple[tuple[Any, ...], dict[str, Any]]]]
# tokens that are computed at once, and whose predictions are
_BATCH_TOKENS, _HEAD_TOKENS = 2048, 512

# layers, what each saw, tokens that are held out -> each layer's tensors and record
Rounding = Callable[
    [Sequence[PlannedLayer], dict[str, Seen], int],
    Iterable[tuple[PlannedLayer, dict[str, torch.Tensor], dict[str, Any]]],
]


class Sweep:
    """Runs a network over tokens and rounds its layers.

    Args:
        tokens: int64 [windows, length].
        folder: where hidden states, gradients and rounded layers are kept.
        seed: of the labels.
        gradients: whether tokens are weighed by them; without, all count alike.
        ranks: the processes that share the work; this one alone if None.
        held_out: how many windows, the last ones, are kept apart; see `capture.Seen`.
        together: layer name -> what names the layers that one rank rounds with it, where that is
            more than `unit_of` says.
    """

    def __init__(
        self, network: Network, tokens: torch.Tensor, folder: Path, seed: int = 0, *,
        gradients: bool = True, ranks: Ranks | None = None, held_out: int = 0,
        together: Mapping[str, object] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        self._ranks = ranks or Ranks()
        own = self._ranks.windows(len(tokens))
        self._first_window = own.start
        self._first_held = max(len(tokens) - held_out - own.start, 0)
        # all but the first of each window
        self._num_held = held_out * max(tokens.shape[1] - 1, 1)
        self._network, self._tokens, self._folder, self._seed = network, tokens[own], folder, seed
        self._own = folder / f"rank-{self._ranks.rank}-of-{self._ranks.count}"
        self._own.mkdir(exist_ok=True)
        self._batches = self._slices(_BATCH_TOKENS)
        self._calls: Calls = []
        self._gradients, self._together = gradients, together

    def run(
        self, to_round: set[str], rounding: Rounding, progress: Callable[[float], None]
    ) -> None:
        """Round layers by their names; those that are rounded already are passed over.

        Args:
            progress: called after each decoder layer with the loss of its layers, 0 going forward.
        Raises:
            CheckpointError: a source is damaged, or a layer's products are not seen.
        """
        if not self._gradients:
            self.forward(progress, to_round, rounding)
            return
        count = len(self._network.layers)
        kept = [i for i in range(count + 1) if self._path("gradient", i).exists()]
        # of the rank that is least far; the others have kept what they had one layer before
        start = max(self._ranks.everyone(min(kept, default=count + 1)))
        if start > count:
            self._start_backward(self.forward(progress, keeps_all=True))
            start = count
        elif start:
            self._calls, _ = self._record()
        for index in reversed(range(start)):
            with self._network.loaded(index) as layers:
                wanted = {layer.name: layer for layer in layers if layer.name in to_round}
                capture = Capture(self._network, wanted.keys(), gradients=True)
                gradient = self._go_backward(index, capture)
            loss = self._round(index, wanted, capture, rounding)
            self._save("gradient", index, gradient)
            for kind in ("gradient", "hidden"):
                self._path(kind, index + 2).unlink(missing_ok=True)
            del capture, gradient
            trim_heap()
            progress(loss)

    def _slices(self, num_tokens: int) -> list[slice]:
        """The windows of so many tokens at once, and those that are held out apart."""
        count, size = len(self._tokens), max(num_tokens // self._tokens.shape[1], 1)
        return [
            slice(first, min(first + size, stop))
            for start, stop in ((0, self._first_held), (self._first_held, count))
            for first in range(start, min(stop, count), size)
        ]

    def _path(self, kind: str, index: int) -> Path:
        return self._own / f"{kind}-{index}.safetensors"

    def _save(self, kind: str, index: int, value: torch.Tensor) -> None:
        save_whole({kind: value.float().cpu()}, self._path(kind, index))

    def _load(self, kind: str, index: int) -> torch.Tensor:
        return load_file(self._path(kind, index))[kind]

    def forward(
        self, progress: Callable[[float], None], to_round: Collection[str] = (),
        rounding: Rounding | None = None, *, keeps_all: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        """The states behind the last decoder layer, [windows, length, hidden size].

        Args:
            to_round: names of layers to round by their inputs alone.
            keeps_all: whether states in front of each decoder layer stay on disk.
        """
        network = self._network
        self._calls, hidden = self._record()
        count = len(network.layers)
        kept = [i for i in range(count + 1) if self._path("hidden", i).exists()]
        if not kept:
            self._save("hidden", 0, hidden)
        start = max(kept, default=0)
        if rounding:
            start = min(self._ranks.everyone(start))
        for index in range(start, count):
            hidden = self._load("hidden", index)
            with network.loaded(index) as layers, torch.no_grad():
                wanted = {layer.name: layer for layer in layers if layer.name in to_round}
                capture, outputs = Capture(network, wanted.keys(), gradients=False), []
                with capture:
                    for number, batch in enumerate(self._batches):
                        capture.is_held_out = batch.start >= self._first_held
                        outputs.append(self._call(index, number, self._input(hidden, batch)))
            if rounding:
                self._round(index, wanted, capture, rounding)
            save_whole(capture.maxima, self._path("cached", index))
            self._save("hidden", index + 1, torch.cat(outputs))
            if not keeps_all:
                self._path("hidden", index - 1).unlink(missing_ok=True)
            del capture, outputs
            trim_heap()
            progress(0.0)
        return self._load("hidden", count)

    def _input(self, hidden: torch.Tensor, batch: slice) -> torch.Tensor:
        return hidden[batch].to(self._network.device)

    def _call(self, index: int, number: int, hidden: torch.Tensor) -> torch.Tensor:
        args, kwargs = self._calls[number][index]
        result = self._network.layers[index](hidden, *args, **kwargs)
        states: torch.Tensor = result[0] if isinstance(result, tuple) else result
        return states

    def _record(self) -> tuple[Calls, torch.Tensor]:
        """What each decoder layer is called with, for each batch, and the first hidden states."""
        calls: Calls = []
        first: list[torch.Tensor] = []

        def record(index: int, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if index == 0:
                first.append(hidden)
                calls.append([])
            if hidden is not first[-1]:
                name = type(self._network.model).__name__
                raise self._network.unsupported(f"{name} computes between its decoder layers")
            calls[-1].append((args, kwargs))
            return hidden

        with self._network.loaded(None), self._network.without_layers(record), torch.no_grad():
            for batch in self._batches:
                tokens = self._tokens[batch].to(self._network.device)
                self._network.model.get_decoder()(input_ids=tokens, use_cache=False)
        return calls, torch.cat(first)

    def _start_backward(self, hidden: torch.Tensor) -> None:
        """The gradient behind the last decoder layer, for labels that the model itself draws."""
        count = len(self._network.layers)
        gradients = []
        with self._network.loaded(None):
            for batch in self._slices(_HEAD_TOKENS):
                before = self._input(hidden, batch).requires_grad_()
                tokens = self._tokens[batch].to(self._network.device)
                logits = self._network.logits(tokens, before)
                # of the loss by the logits: probabilities, less 1 for the label
                slope = logits.detach().softmax(-1)
                for window, own in enumerate(slope, start=batch.start):
                    labels = self._draw(window, own)[:, None]
                    own.scatter_add_(1, labels, own.new_full(labels.shape, -1))
                logits.backward(slope)  # type: ignore[no-untyped-call]
                gradients.append(_gradient(before))
        self._save("gradient", count, torch.cat(gradients))

    def _draw(self, window: int, probabilities: torch.Tensor) -> torch.Tensor:
        """A label for every position of a window, the same whatever is in its batch: [L]."""
        generator = torch.Generator(probabilities.device).manual_seed(
            self._seed * 1_000_003 + self._first_window + window
        )
        return draw(probabilities, generator)

    def _go_backward(self, index: int, capture: Capture) -> torch.Tensor:
        hidden, behind = self._load("hidden", index), self._load("gradient", index + 1)
        gradients = []
        for number, batch in enumerate(self._batches):
            before = self._input(hidden, batch).requires_grad_()
            capture.is_held_out = batch.start >= self._first_held
            with capture:
                after = self._call(index, number, before)
                after.backward(self._input(behind, batch))  # type: ignore[no-untyped-call]
            gradients.append(_gradient(before))
        return torch.cat(gradients)

    def _round(
        self, index: int, wanted: dict[str, PlannedLayer], capture: Capture, rounding: Rounding
    ) -> float:
        tensors: dict[str, torch.Tensor] = {}
        records: list[dict[str, Any]] = []
        ranks = self._ranks
        units: dict[object, int] = {}
        owners = {
            name: units.setdefault(self._together.get(name, unit_of(layer)), len(units))
            % ranks.count
            for name, layer in wanted.items()
        }
        seen = ranks.exchange(capture.seen, owners, [*wanted])
        self._check_seen(wanted, set().union(*ranks.everyone(set(seen))))
        own = [layer for name, layer in wanted.items() if owners[name] == ranks.rank]
        for layer, made, record in rounding(own, seen, self._num_held):
            tensors |= {f"{layer.name}.{suffix}": tensor for suffix, tensor in made.items()}
            records.append({"layer": layer.name, **record})
        path = rounded_paths(self._folder, index, ranks.count)[ranks.rank]
        save_whole(tensors, path, {"records": json.dumps(records)})
        return math.fsum(ranks.everyone(sum(record.get("loss") or 0.0 for record in records)))

    def _check_seen(self, wanted: dict[str, PlannedLayer], seen: set[str]) -> None:
        """See that each layer saw tokens; of experts, one of those that read the same states."""

        alike = {
            name: (layer.module, getattr(layer.shard, "projection", name))
            for name, layer in wanted.items()
        }
        found = {alike[name] for name in wanted if name in seen}
        for name in wanted:
            if alike[name] not in found:
                raise self._network.unsupported(f"it does not run {name} as a linear layer")


def unit_of(layer: PlannedLayer) -> object:
    """What one rank rounds together: experts of a layer that read the same states, or one layer."""
    if not isinstance(layer.shard, ExpertShard) or layer.shard.projection == "w2":
        return layer.name
    return layer.module, layer.shard.projection


def rounded_paths(folder: Path, index: int, num_ranks: int) -> list[Path]:
    """Where each rank writes what it rounded of a decoder layer."""
    names = (f"rounded-{index}-{rank}-of-{num_ranks}" for rank in range(num_ranks))
    return [folder / f"{name}.safetensors" for name in names]


def read_maxima(folder: Path, index: int) -> dict[str, float]:
    """The largest magnitudes of what a decoder layer caches, over all ranks; see `Capture`."""
    found: dict[str, float] = {}
    for path in folder.glob(f"rank-*/cached-{index}.safetensors"):
        for part, value in load_file(path).items():
            found[part] = max(found.get(part, 0.0), float(value))
    return found


def read_records(path: Path) -> list[dict[str, Any]]:
    """What a rank recorded of the layers that it rounded, by where it wrote them."""
    with safe_open(path, framework="pt") as file:
        found: list[dict[str, Any]] = json.loads(file.metadata()["records"])
    return found


def _gradient(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.grad is not None
    return tensor.grad


def save_whole(
    tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a file that is there whole or not at all."""
    temporary = path.with_suffix(".tmp")
    try:
        save_file(tensors, temporary, metadata)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        remedy = "make room or access, and run the same command again: it continues"
        what = f"cannot be written ({error})"
        raise ConvertError(Problem(str(path), what, remedy, "write")) from error
