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
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mixedprec_plugin.calibrate.capture import Capture, Seen
from mixedprec_plugin.calibrate.network import Network
from mixedprec_plugin.errors import CheckpointError, Problem
from mixedprec_plugin.plan.model import PlannedLayer

# tokens that are computed at once
_BATCH_TOKENS = 2048

Rounding = Callable[[PlannedLayer, Seen, int], tuple[dict[str, torch.Tensor], dict[str, Any]]]


class Sweep:
    """Runs a network over tokens and rounds its layers.

    Args:
        tokens: int64 [windows, length].
        folder: where hidden states, gradients and rounded layers are kept.
        seed: of the labels.
    """

    def __init__(
        self,
        network: Network,
        tokens: torch.Tensor,
        folder: Path,
        seed: int = 0,
    ) -> None:
        self._network, self._tokens, self._folder, self._seed = network, tokens, folder, seed
        size = max(_BATCH_TOKENS // tokens.shape[1], 1)
        self._batches = [slice(i, i + size) for i in range(0, len(tokens), size)]
        self._calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []

    def run(
        self, to_round: set[str], rounding: Rounding, progress: Callable[[float], None]
    ) -> None:
        """Round layers by their names; those that are rounded already are passed over.

        Args:
            progress: called after each decoder layer with the loss of its layers, 0 going forward.
        Raises:
            CheckpointError: a source is damaged, or a layer's products are not seen.
        """
        count = len(self._network.layers)
        start = min((i for i in range(count + 1) if self._path("gradient", i).exists()), default=-1)
        if start < 0:
            self._start_backward(self.forward(progress, keeps_all=True))
            start = count
        elif start:
            self._calls, _ = self._record()
        for index in reversed(range(start)):
            with self._network.loaded(index) as layers:
                wanted = {layer.name: layer for layer in layers if layer.name in to_round}
                capture = Capture(self._network, wanted.keys())
                gradient = self._go_backward(index, capture)
            loss = self._round(index, wanted, capture, rounding)
            self._save("gradient", index, gradient)
            self._path("gradient", index + 1).unlink()
            self._path("hidden", index + 1).unlink(missing_ok=True)
            progress(loss)

    def _path(self, kind: str, index: int) -> Path:
        return self._folder / f"{kind}-{index}.safetensors"

    def _save(self, kind: str, index: int, value: torch.Tensor) -> None:
        save_whole({kind: value.float().cpu()}, self._path(kind, index))

    def _load(self, kind: str, index: int) -> torch.Tensor:
        return load_file(self._path(kind, index))[kind]

    def forward(
        self, progress: Callable[[float], None], *, keeps_all: bool = False
    ) -> torch.Tensor:
        """The states behind the last decoder layer, [windows, length, hidden size].

        Args:
            keeps_all: whether those in front of each decoder layer stay on disk.
        """
        network = self._network
        self._calls, hidden = self._record()
        count = len(network.layers)
        kept = [i for i in range(count + 1) if self._path("hidden", i).exists()]
        if not kept:
            self._save("hidden", 0, hidden)
        for index in range(max(kept, default=0), count):
            hidden = self._load("hidden", index)
            with network.loaded(index), torch.no_grad():
                outputs = [
                    self._call(index, number, self._input(hidden, batch))
                    for number, batch in enumerate(self._batches)
                ]
            self._save("hidden", index + 1, torch.cat(outputs))
            if not keeps_all:
                self._path("hidden", index).unlink()
            progress(0.0)
        return self._load("hidden", count)

    def _input(self, hidden: torch.Tensor, batch: slice) -> torch.Tensor:
        network = self._network
        return hidden[batch].to(network.device, network.model.dtype)

    def _call(self, index: int, number: int, hidden: torch.Tensor) -> torch.Tensor:
        args, kwargs = self._calls[number][index]
        result = self._network.layers[index](hidden, *args, **kwargs)
        states: torch.Tensor = result[0] if isinstance(result, tuple) else result
        return states

    def _record(self) -> tuple[list[list[tuple[tuple[Any, ...], dict[str, Any]]]], torch.Tensor]:
        """What each decoder layer is called with, for each batch, and the first hidden states."""
        calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []
        first: list[torch.Tensor] = []

        def record(index: int, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if index == 0:
                first.append(hidden)
                calls.append([])
            if hidden is not first[-1]:
                what = f"{type(self._network.model).__name__} computes between its decoder layers"
                raise CheckpointError(Problem("--calibrate", what, "leave it out"))
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
            for batch in self._batches:
                before = self._input(hidden, batch).requires_grad_()
                tokens = self._tokens[batch].to(self._network.device)
                logits = self._network.logits(tokens, before).float()
                labels = torch.stack([
                    self._draw(window, logits[at].detach())
                    for at, window in enumerate(range(batch.start, batch.start + len(tokens)))
                ])  # fmt: skip
                loss = torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), labels.flatten(), reduction="sum"
                )
                loss.backward()  # type: ignore[no-untyped-call]
                gradients.append(_gradient(before))
        self._save("gradient", count, torch.cat(gradients))

    def _draw(self, window: int, logits: torch.Tensor) -> torch.Tensor:
        """Draw a label for every position of a window, the same whatever is in its batch: [L]."""
        generator = torch.Generator(logits.device).manual_seed(self._seed * 1_000_003 + window)
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]

    def _go_backward(self, index: int, capture: Capture) -> torch.Tensor:
        hidden, behind = self._load("hidden", index), self._load("gradient", index + 1)
        gradients = []
        for number, batch in enumerate(self._batches):
            before = self._input(hidden, batch).requires_grad_()
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
        for name, layer in wanted.items():
            made, record = rounding(
                layer, capture.seen.pop(name, Seen([], [])), self._tokens.numel()
            )
            tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in made.items()}
            records.append({"layer": name, **record})
        save_whole(tensors, self._path("rounded", index), {"records": json.dumps(records)})
        return float(sum(record["loss"] for record in records))


def _gradient(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.grad is not None
    return tensor.grad


def save_whole(
    tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a file that is there whole or not at all."""
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata)
    os.replace(temporary, path)
