"""Scores by what a serving engine predicts: KL of the model with one unit in other weights.

An engine serves the unquantized model in float32, so that rounding elsewhere hides nothing, and is
handed the weights of one unit after the other, as each candidate serves them
(`/update_weights_from_disk`, with a folder of that unit alone). What a method does to activations
is not seen so: candidates that quantize them are not scored.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from mixedprec_plugin.calibrate.network import Network
from mixedprec_plugin.calibrate.sweep import save_whole
from mixedprec_plugin.calibrate.text import open_tokenizer, read_text, write_text
from mixedprec_plugin.checkpoint.reader import Reader
from mixedprec_plugin.compose.stream import compose_floats, compose_served
from mixedprec_plugin.errors import Problem, UsageError
from mixedprec_plugin.evaluate.engine import distributions
from mixedprec_plugin.evaluate.server import Server
from mixedprec_plugin.families.config import text_config
from mixedprec_plugin.plan.model import PlannedLayer
from mixedprec_plugin.search.candidates import AS_STORED, Choices, Unit
from mixedprec_plugin.search.kept import Basis, Scores
from mixedprec_plugin.search.scores import input_rounding

# the server's arithmetic; of SGLang's backends for attention this one has float32 everywhere
_FLAGS = ("--dtype", "float32", "--attention-backend", "torch_native", "--disable-cuda-graph")


def unmeasured(choices: Choices) -> dict[str, str]:
    """The units that cannot be measured, and why.

    Raises:
        UsageError: the model is quantized itself, so that its server takes no other weights.
    """
    quantized = [x.name for x in choices.base.layers if x.stored and not x.stored.is_float]
    if quantized:
        what = f"{choices.base.source.path} is quantized itself ({len(quantized)} layers)"
        remedy = "search with --inputs, which a server of this model gathers"
        raise UsageError(Problem("--in-engine", what, remedy))
    is_tied = bool(text_config(choices.base.source.config).get("tie_word_embeddings"))
    found = {}
    for name, unit in choices.units.items():
        if not any(can_measure(unit, x) for x in unit.options if x != AS_STORED):
            found[name] = "all of its candidates quantize activations, or need a conversion"
        elif is_tied and unit.layers[0].kind == "lm_head":
            found[name] = "it is the embedding, which stays as it is"
        elif any(x.inputs["weight"].name != f"{x.name}.weight" for x in unit.layers):
            found[name] = "it is stored in one tensor with others"
    return found


def can_measure(unit: Unit, candidate: str) -> bool:
    """Whether the weights that a candidate serves tell all that it changes."""
    option = unit.options[candidate]
    is_rounded = any(input_rounding(layer) for layer in option.planned)
    return not (option.candidate.needs_conversion or is_rounded)


class Engine:
    """A server of the unquantized model, and what it predicts of a text.

    Args:
        server: that runs.
        model: its checkpoint.
        tokens: int64 [windows, length].
        folder: an empty one.
    """

    def __init__(
        self, server: Server, choices: Choices, tokens: torch.Tensor, folder: Path
    ) -> None:
        self._server, self._folder = server, folder
        self._vocabulary = int(text_config(choices.base.source.config)["vocab_size"])
        self._tokens: list[list[int]] = tokens.tolist()
        folder.mkdir()
        shutil.copy(choices.base.source.path / "config.json", folder)
        self._expected = [self._predict(window) for window in self._tokens]

    def divergence(self) -> float:
        """KL from what it predicted first, in nats a token."""
        sums = count = 0.0
        for window, expected in zip(self._tokens, self._expected, strict=True):
            found = self._predict(window)
            sums += float((np.exp(expected) * (expected - found)).sum(dtype=np.float64))
            count += len(expected)
        return sums / count

    def take(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Have the server run other weights.

        Args:
            weights: tensor name as the checkpoint spells it -> float [N, K].
        """
        tensors = {name: tensor.float().contiguous() for name, tensor in weights.items()}
        save_whole(tensors, self._folder / "model.safetensors", {"format": "pt"})
        body = {"model_path": str(self._folder), "load_format": "safetensors"}
        self._server.request("/update_weights_from_disk", body)

    def _predict(self, window: list[int]) -> np.ndarray:
        rows = distributions(self._server, window, self._vocabulary)
        return np.concatenate([own for _, own in rows])


def measure_scores(
    choices: Choices,
    wanted: Mapping[str, Collection[str]],
    basis: Basis,
    folder: Path,
    progress: Progress,
) -> Iterator[Scores]:
    """Measure candidates, a unit at a time.

    Args:
        wanted: unit name -> names of the candidates; of units that can be measured.
        basis: the text.
        folder: an empty one, for weights and the server's log.
    Yields:
        the scores of a unit.
    Raises:
        ServerError: the server does not start, or fails.
        CheckpointError: a source is damaged.
        UsageError: the text cannot be read, or is too short.
    """
    model, target = choices.base.source.path, choices.base.target
    flags = ["--device", target.device, "--tp-size", str(target.tp_size), *_FLAGS]
    with Reader() as reader:
        tokens = _text(choices, basis, reader)
        with Server(model, folder / "server.log", flags=flags, is_quiet=True) as server:
            engine = Engine(server, choices, tokens, folder / "weights")
            task = progress.add_task("measuring", total=sum(map(len, wanted.values())))
            for name, candidates in wanted.items():
                unit, found = choices.units[name], {}
                for candidate in candidates:
                    layers = unit.options[candidate].layers
                    engine.take(
                        {
                            f"{x.name}.weight": compose_served(x, target, reader)["weight"]
                            for x in layers
                        }
                    )
                    found[candidate] = max(0.0, engine.divergence())
                    progress.advance(task)
                engine.take(_own(unit.layers, target, reader))
                yield {name: found}
            progress.remove_task(task)


def _own(layers: Collection[PlannedLayer], target: Any, reader: Reader) -> dict[str, torch.Tensor]:
    return {f"{x.name}.weight": compose_floats(x, target, reader)["weight"] for x in layers}


def _text(choices: Choices, basis: Basis, reader: Reader) -> torch.Tensor:
    """The windows to measure on; only what writes its own needs a class of transformers."""
    tokenizer = open_tokenizer(choices.base.source.path)
    if basis.text is not None:
        return read_text(basis.text, tokenizer, basis.held_out, basis.length)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = Network(choices.base, reader, torch.float32, device)
    return write_text(network, tokenizer, basis.held_out, basis.length, basis.seed)
