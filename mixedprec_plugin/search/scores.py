"""What each candidate of each unit costs: its error, weighed by the gradients of held-out text.

Of one token, an error d in the outputs of a unit changes the log-likelihood of a label that the
model draws by g'd, g being the gradient. Half the mean over tokens of (g'd)^2, rows summed, is the
divergence in nats that the error causes, to second order; beyond a nat a change counts as itself.
d is what the unit makes of the candidate's weights and of inputs as its kernels round them, less
what it makes now, for tokens that neither the candidate nor H saw, but the first of each window.

Without gradients it is the share of the unit's outputs that is error, |d|^2 / |y|^2, times the
share of the tokens that the unit sees: a number to rank by, in no unit.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from safetensors.torch import load_file

from mixedprec_plugin.calibrate.capture import Held, Seen
from mixedprec_plugin.calibrate.moments import nats
from mixedprec_plugin.calibrate.network import Network
from mixedprec_plugin.calibrate.rounding import LayerRounding, Moments
from mixedprec_plugin.calibrate.sweep import Sweep, read_records, rounded_paths, save_whole
from mixedprec_plugin.calibrate.text import held_last, text_for
from mixedprec_plugin.checkpoint.reader import Reader
from mixedprec_plugin.checkpoint.recorded import digest_of
from mixedprec_plugin.compose.stream import Tensors, compose_floats, compose_layer, served_floats
from mixedprec_plugin.errors import Problem, UsageError
from mixedprec_plugin.methods.registry import AUTO, METHODS
from mixedprec_plugin.plan.model import PlannedLayer
from mixedprec_plugin.quantize.codec import load_codec
from mixedprec_plugin.search.candidates import Choices, Unit
from mixedprec_plugin.search.kept import Basis, KeptScores, Scores, Wanted


class Scoring:
    """Scores the units of a decoder layer; see `calibrate.sweep.Rounding`."""

    def __init__(
        self, choices: Choices, wanted: Wanted, reader: Reader, device: torch.device
    ) -> None:
        self._choices, self._wanted, self._reader, self._device = choices, wanted, reader, device
        self._rounding = LayerRounding(choices.base.target, reader, device)
        self._unit_of = {
            layer.name: unit for unit in choices.units.values() for layer in unit.layers
        }

    def __call__(
        self, layers: Sequence[PlannedLayer], seen: dict[str, Seen], num_held: int
    ) -> Iterator[tuple[PlannedLayer, Tensors, dict[str, Any]]]:
        """Yield the last layer of each unit, no tensors, and "scores": candidate -> score."""
        held = {name: one.held for name, one in seen.items()}
        sums: dict[str, _Sums] = {}
        waiting = {unit.name: len(unit.layers) for x in layers if (unit := self._unit_of[x.name])}
        for layer, moments in self._rounding.moments(layers, seen):
            unit = self._unit_of[layer.name]
            own = sums.setdefault(unit.name, _Sums())
            with torch.no_grad():
                self._add(own, unit, layer, held.pop(layer.name, []), moments)
            waiting[unit.name] -= 1
            if not waiting[unit.name]:
                scores = sums.pop(unit.name).scores(num_held)
                known = {name: scores.get(name, 0.0) for name in self._wanted[unit.name]}
                yield layer, {}, {"loss": 0.0, "unit": unit.name, "scores": known}

    def _add(
        self, sums: _Sums, unit: Unit, layer: PlannedLayer, held: Sequence[Held], moments: Moments
    ) -> None:
        """Add what one layer's candidates do to what its unit's other layers did."""
        if not held:
            return  # an expert to which no token of the text went
        target = self._choices.base.target
        weight = compose_floats(layer, target, self._reader)["weight"].float()
        tokens = _Tokens(held, weight, self._device)
        if tokens.gradients is None:
            outputs = float(tokens.pulled.square().sum(dtype=torch.float64))
            sums.outputs = (sums.outputs or 0.0) + outputs
        for name in self._wanted[unit.name]:
            option = unit.options[name]
            planned = next(x for x in option.layers if x.name == layer.name)
            if option.candidate.needs_conversion:
                tensors, _, _ = self._rounding.round(planned, moments)
            else:
                tensors = compose_layer(planned, target, self._reader)
            sums.changes[name] = sums.changes.get(name, 0) + tokens.changes(planned, tensors)


def input_rounding(layer: PlannedLayer) -> Callable[[torch.Tensor, Tensors], torch.Tensor] | None:
    """What rounds a planned layer's inputs, given its tensors, as its kernels do; None for none."""
    assert layer.scheme is not None
    method, arguments = layer.method, layer.scheme.arguments
    if method == AUTO and layer.stored is not None:
        method, arguments = layer.stored.method or AUTO, layer.stored.arguments
    codec = METHODS[method].codec
    found = getattr(load_codec(codec), "round_inputs", None) if codec else None
    return found and (lambda x, tensors: found(x, tensors, arguments))


class _Tokens:
    """What a layer saw of the text that is held out.

    Attributes:
        x: float32 [T, K].
        gradients: [T, N]; None without.
        pulled: gradients times weight, [T, K]; without gradients the outputs, [T, N].
    """

    def __init__(self, held: Sequence[Held], weight: torch.Tensor, device: torch.device) -> None:
        self.x = torch.cat([one.x for one in held]).to(device).float()
        self._weight = weight.to(device)
        self.gradients: torch.Tensor | None = None
        found = [one.gradients for one in held if one.gradients is not None]
        if found:
            self.gradients = torch.cat(found).to(device).float()
            self.pulled = self.gradients @ self._weight
        else:
            self.pulled = self.x @ self._weight.t()

    def changes(self, layer: PlannedLayer, tensors: Tensors) -> torch.Tensor:
        """What a candidate's tensors of the layer change of each token, float64 [T].

        By the gradients, of the log-likelihood; without them, the squared error of the outputs.
        """
        weight = served_floats(layer, tensors)["weight"].to(self.x)
        round_inputs = input_rounding(layer)
        inputs = round_inputs(self.x, tensors).float() if round_inputs else self.x
        if self.gradients is None:
            return (inputs @ weight.t() - self.pulled).square().sum(1).double()
        change = ((self.gradients @ (weight - self._weight)) * inputs).sum(1)
        if round_inputs:
            change += (self.pulled * (inputs - self.x)).sum(1)
        return change.double()


class _Sums:
    """Sums over the layers of one unit, for each candidate."""

    def __init__(self) -> None:
        self.changes: dict[str, torch.Tensor] = {}
        self.outputs: float | None = None

    def scores(self, num_tokens: int) -> dict[str, float]:
        """The score of each candidate."""
        if self.outputs is None:
            return {k: float(nats(change).sum()) / num_tokens for k, change in self.changes.items()}
        return {
            name: float(error.sum()) / max(self.outputs, 1e-30) * len(error) / num_tokens
            for name, error in self.changes.items()
        }


def sweep_for_scores(
    choices: Choices, wanted: Wanted, kept: KeptScores, progress: Progress
) -> Iterator[Scores]:
    """Score candidates in one sweep over the model, and yield once; see `make_scores`."""
    work = kept.folder(f"work-{digest_of([kept.facts, wanted])[:16]}")
    yield make_scores(choices, wanted, kept.basis, work, progress)
    # once the scores are written
    shutil.rmtree(work)


def make_scores(
    choices: Choices, wanted: Wanted, basis: Basis, folder: Path, progress: Progress
) -> Scores:
    """Score candidates in one sweep over the model; what a folder holds of a stopped one goes on.

    Raises:
        CheckpointError: a source is damaged, or transformers does not have the model's class.
        UsageError: the text cannot be read, or is too short.
    """
    with Reader() as reader:
        network = Network(choices.base, reader)
        tokens = _text(network, basis, folder, progress)
        scoring = Scoring(choices, wanted, reader, network.device)
        count = len(network.layers)
        task = progress.add_task("scoring", total=(2 if basis.gradients else 1) * count)
        names = {layer.name for unit in wanted for layer in choices.units[unit].layers}
        reached = {x.name for index in range(count) for x in network.planned(index)}
        sweep = Sweep(
            network, tokens, folder, basis.seed, gradients=basis.gradients,
            held_out=basis.held_out,
        )  # fmt: skip
        sweep.run(names & reached, scoring, lambda _: progress.advance(task))
        progress.remove_task(task)
        paths = [path for index in range(count) for path in rounded_paths(folder, index, 1)]
        records = [one for path in paths for one in read_records(path)]
    found: Scores = {record["unit"]: record["scores"] for record in records}
    fill_unseen(found, choices)
    return found


def fill_unseen(scores: Scores, choices: Choices) -> None:
    """Have experts that saw no token cost what the cheapest of their layer does."""
    modules: dict[str, list[str]] = {}
    for unit in scores:
        modules.setdefault(choices.units[unit].layers[0].module, []).append(unit)
    for units in modules.values():
        for unit in units:
            for name, score in scores[unit].items():
                if score == 0:
                    seen = [scores[u][name] for u in units if scores[u].get(name, 0) > 0]
                    scores[unit][name] = min(seen, default=0.0)


def _text(network: Network, basis: Basis, folder: Path, progress: Progress) -> torch.Tensor:
    """Windows of text, those that are held out at the end."""
    path, count = folder / "text.safetensors", basis.windows + basis.held_out
    if path.exists():
        return load_file(path)["tokens"]
    made = text_for(network, basis.text, count, basis.length, basis.seed, progress)
    if basis.text is not None:
        if len(made) < count:
            what = (
                f"{basis.text} has {len(made)} windows of {basis.length} tokens (expected "
                f"{count}, {basis.held_out} of them held out)"
            )
            remedy = "name a longer text, or give fewer --windows"
            raise UsageError(Problem("--text", what, remedy))
        made = held_last(made, basis.held_out)
    save_whole({"tokens": made}, path)
    return made
