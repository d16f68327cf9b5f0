"""Calibrating a plan: text, statistics and codes, kept in a folder until they are written."""

from __future__ import annotations

import dataclasses
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from safetensors import safe_open
from safetensors.torch import load_file

from mixedprec_plugin.calibrate import LENGTH, WINDOWS
from mixedprec_plugin.calibrate.folded import FoldedRounding
from mixedprec_plugin.calibrate.folds import NO_FOLDS, find_folds
from mixedprec_plugin.calibrate.network import Network
from mixedprec_plugin.calibrate.ranks import Ranks
from mixedprec_plugin.calibrate.rounding import is_rounded_so
from mixedprec_plugin.calibrate.sweep import (
    Sweep,
    read_maxima,
    read_records,
    rounded_paths,
    save_whole,
)
from mixedprec_plugin.calibrate.text import held_last, num_held_out, text_for
from mixedprec_plugin.checkpoint.reader import Reader
from mixedprec_plugin.checkpoint.recorded import file_digest
from mixedprec_plugin.compose.stream import Tensors, compose_layer, round_to_nearest
from mixedprec_plugin.errors import PlanError, Problem, UsageError
from mixedprec_plugin.families.config import count_of, text_config
from mixedprec_plugin.families.names import parent_of
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.plan.folding import fold_problems
from mixedprec_plugin.plan.model import Plan, PlannedLayer

_TEXT = "text.safetensors"
_LARGEST_E4M3 = 448.0


@dataclasses.dataclass(frozen=True)
class Options:
    """What is calibrated on.

    Attributes:
        text: a file, or None for text that the model writes.
        windows: number of windows; fewer where the file is shorter. An eighth as many more are held
            out, on which losses are predicted.
        length: tokens of a window.
        seed: of the text and of the labels.
        gradients: whether tokens are weighed by the gradient of the model's own predictions.
        fold: whether scales are folded between layers, where that loses less.
    """

    text: Path | None = None
    windows: int = WINDOWS
    length: int = LENGTH
    seed: int = 0
    gradients: bool = True
    fold: bool = False

    @property
    def all_windows(self) -> int:
        """Windows of text, with those that are held out."""
        return self.windows + max(self.windows // 8, 1)


class Calibration:
    """The codes of a plan's layers, once `prepare` made them.

    Args:
        plan: a plan without errors.
        everything: whether all layers are calibrated that can be, or those whose scheme asks.
    Raises:
        PlanError: no layer of the plan is rounded to codes, and no scale is asked for; or no unit
            of them can be folded.
    Attributes:
        folds: what can be folded, and what not; empty where that was not asked for.
    """

    def __init__(
        self, plan: Plan, options: Options, progress: Progress, *, everything: bool
    ) -> None:
        self._plan, self._options, self._progress = plan, options, progress
        layers = [layer for layer in plan.layers if everything or layer.asks_for_calibration]
        self._names = {layer.name for layer in layers if is_rounded_so(layer)}
        self._attentions = set(plan.calibrated_attentions)
        if not self._names and not self._attentions:
            what = "no layer of the plan is rounded to codes (expected a quantized one)"
            raise PlanError(Problem("--calibrate", what, "leave it out", "calibrate"))
        self.folds = find_folds(plan, self._names) if options.fold else NO_FOLDS
        if options.fold and not self.folds.groups:
            why = ", ".join(dict.fromkeys(problem.what for problem in self.folds.left))
            what = f"no layers of the plan can be folded ({why or 'none is rounded to codes'})"
            raise PlanError(Problem("--fold", what, "leave it out", "calibrate"))
        self._ranks = Ranks()
        self._is_begun = False
        self._files: dict[str, Path] = {}
        self._records: list[dict[str, Any]] = []
        self._folded: list[dict[str, Any]] = []
        self._scales: dict[str, Tensors] = {}

    def facts(self) -> dict[str, Any]:
        """What the codes depend on, beside the plan."""
        text = self._options.text
        return {
            **dataclasses.asdict(self._options),
            "text": file_digest(text) if text else "written by the model",
            "versions": {name: version(name) for name in ("torch", "transformers")},
        }

    def disk_bytes(self, folder: Path) -> int:
        """What the work takes on disk at most, beside what of it lies in a folder already.

        Hidden states in front of each decoder layer and behind the last, two of gradients, and the
        rounded layers.
        """
        said, options = text_config(self._plan.source.config), self._options
        num_states = count_of(said, "num_hidden_layers") + 3 if options.gradients else 2
        num_tokens = options.all_windows * options.length
        floats = num_states * num_tokens * count_of(said, "hidden_size")
        layers = (x.bytes_after for x in self._plan.layers if x.name in self._names)
        kept = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        return max(4 * floats + sum(layers) - kept, 0)

    def prepare(self, folder: Path) -> None:
        """Round every layer, or go on where that was stopped.

        Args:
            folder: where the work is kept; made if it is not there.
        Raises:
            CheckpointError: a source is damaged, or transformers does not have the model's class.
            PlanError: a layer that transformers' language model does not have.
        """
        folder.mkdir(exist_ok=True)
        if not self.is_helper:
            self._is_begun = True
            self._ranks.share(str(folder))
        with Reader() as reader:
            network = Network(self._plan, reader, self._ranks.device)
            count = len(network.layers)
            self._check_reached(network)
            if not min(self._ranks.everyone(self._index(folder, count))):
                tokens = self._tokens(network, folder)
                # what attention caches is seen going forward
                gradients = self._options.gradients and bool(self._names)
                passes = 2 if gradients else 1
                task = self._progress.add_task("calibrating", total=passes * count)
                total = 0.0

                def advance(loss: float) -> None:
                    nonlocal total
                    total += loss
                    text = f"calibrating, KL so far {total:.4f}" if total else "calibrating"
                    self._progress.update(task, advance=1, description=text)

                device, options = self._ranks.device, self._options
                rounding = FoldedRounding(self._plan.target, reader, device, self.folds)
                sweep = Sweep(
                    network, tokens, folder, options.seed,
                    gradients=gradients, ranks=self._ranks,
                    held_out=num_held_out(len(tokens)), together=rounding.groups,
                )  # fmt: skip
                sweep.run(self._names, rounding, advance)
                self._progress.remove_task(task)
                self._index(folder, count)
            self._scale(network, folder)

    @property
    def is_helper(self) -> bool:
        """Whether another process writes the checkpoint, and this one only calibrates."""
        return self._ranks.rank > 0

    def help(self) -> None:
        """Calibrate with rank 0, if it does."""
        if folder := self._ranks.share(None):
            self.prepare(Path(folder))

    def dismiss(self) -> None:
        """Let the other ranks go where nothing was left to calibrate."""
        if not self._is_begun:
            self._ranks.share(None)

    def _tokens(self, network: Network, folder: Path) -> torch.Tensor:
        options, path = self._options, folder / _TEXT
        if self._ranks.rank == 0 and not path.exists():
            sizes = options.all_windows, options.length, options.seed
            made = text_for(network, options.text, *sizes, self._progress)
            if options.text is not None:
                made = held_last(made, num_held_out(len(made)))
            save_whole({"tokens": made}, path)
        self._ranks.everyone(None)
        tokens = load_file(path)["tokens"]
        if len(tokens) < self._ranks.count:
            what = f"there are {len(tokens)} (expected one for each of {self._ranks.count} ranks)"
            raise UsageError(Problem("--windows", what, "take more text, or fewer ranks"))
        return tokens

    def _check_reached(self, network: Network) -> None:
        """See that every layer is in a decoder layer, which alone are swept."""
        indices = range(len(network.layers))
        reached = {layer.name for index in indices for layer in network.planned(index)}
        if missed := self._names - reached:
            what = "transformers' language model has no decoder layer with it (expected one)"
            remedy = (
                "leave out --calibrate, and write rounding: calibrated in the schemes of the others"
            )
            problems = [Problem(name, what, remedy, "calibrate") for name in sorted(missed)]
            raise PlanError(fold_problems(problems))

    def _index(self, folder: Path, count: int) -> bool:
        """Find the rounded layers; whether all of them are there."""
        of = self._ranks.count
        paths = [path for index in range(count) for path in rounded_paths(folder, index, of)]
        if not all(path.exists() for path in paths):
            return False
        for path in paths:
            records = read_records(path)
            self._files |= {record["layer"]: path for record in records}
            self._records += [record for record in records if "exponent" not in record]
            self._folded += [record for record in records if "exponent" in record]
        return True

    def _scale(self, network: Network, folder: Path) -> None:
        """Make the scales of the KV cache, where transformers' attention was seen."""
        for index in range(len(network.layers)):
            inside = {f"{parent_of(layer.name)}.attn" for layer in network.planned(index)}
            for name in sorted(inside & self._attentions):
                maxima = read_maxima(folder, index)
                if not maxima:
                    raise network.unsupported(f"it does not run {parent_of(name)} in one product")
                self._scales[name] = {
                    f"{part[0]}_scale": _kv_scale(largest) for part, largest in maxima.items()
                }
        if lacking := sorted(self._attentions - self._scales.keys()):
            raise network.unsupported(f"it has no decoder layer with {parent_of(lacking[0])}")

    def quantize(self, layer: PlannedLayer, weight: torch.Tensor, target: Target) -> Tensors:
        """The tensors that a layer was rounded to; to the nearest code, if it is none of ours."""
        if layer.name in self._scales:
            return dict(self._scales[layer.name])
        if layer.name not in self._names:
            return round_to_nearest(layer, weight, target)
        return self._kept(layer)

    def compose(self, layer: PlannedLayer, target: Target, reader: Reader) -> Tensors:
        """Compose a layer with what was calibrated of it; see `compose_layer`."""
        outputs = compose_layer(layer, target, reader, self.quantize)
        is_divided = layer.kind == "norm" and layer.name in self._files
        return {**outputs, **self._kept(layer)} if is_divided else outputs

    def _kept(self, layer: PlannedLayer) -> Tensors:
        with safe_open(self._files[layer.name], framework="pt") as file:
            names = [name.rpartition(".") for name in file.offset_keys()]
            return {
                suffix: file.get_tensor(f"{name}.{suffix}")
                for name, _, suffix in names
                if name == layer.name
            }

    @property
    def predicted_loss(self) -> float | None:
        """KL in nats a token of text that is held out; None before, or without gradients."""
        losses = [one["loss"] for one in self._records if one["loss"] is not None]
        return math.fsum(losses) if losses else None

    @property
    def folded(self) -> list[str]:
        """Names of the norms and layers that were divided for those that read them."""
        return [record["layer"] for record in self._folded]

    @property
    def unseen(self) -> list[str]:
        """Names of the layers that no token of the text reached: experts of a mixture."""
        return [record["layer"] for record in self._records if not record["tokens"]]

    def record(self) -> dict[str, Any]:
        """What was calibrated on, and each layer's predicted loss in nats a token."""
        return {
            **self.facts(),
            "predicted_loss": self.predicted_loss,
            "kv_scales": {
                name: {suffix: float(scale) for suffix, scale in made.items()}
                for name, made in self._scales.items()
            },
            "folded": self._folded,
            "layers": self._records,
        }


def _kv_scale(largest: float) -> torch.Tensor:
    """The scale of keys or values in FP8 that are at most so large, float32 []; never zero.

    Source: llm-compressor, which observes the same states (modifiers/quantization/calibration.py,
    `calibrate_kv_cache_input_hook`), and `calculate_qparams` of compressed-tensors.
    """
    scale = torch.tensor(largest, dtype=torch.float32) / _LARGEST_E4M3
    return torch.where(scale == 0, torch.finfo(torch.float32).eps, scale)
