"""Scores by what a serving engine predicts: KL of the model with one unit in other weights.

An engine serves the unquantized model in float32, so that rounding elsewhere hides nothing, and is
handed the weights of one unit after the other, as each candidate serves them. What a method does to
activations is not seen so: candidates that quantize them are not scored.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress

from mixedprec_plugin.calibrate.network import Network
from mixedprec_plugin.calibrate.sweep import save_whole
from mixedprec_plugin.calibrate.text import open_tokenizer, read_text, text_for
from mixedprec_plugin.checkpoint.reader import Reader
from mixedprec_plugin.compose.stream import Compose, compose_floats, compose_served
from mixedprec_plugin.errors import Problem, UsageError
from mixedprec_plugin.evaluate.divergence import summed_kl
from mixedprec_plugin.evaluate.engine import distributions
from mixedprec_plugin.evaluate.server import Server
from mixedprec_plugin.families.config import text_config, ties_head
from mixedprec_plugin.plan.model import PlannedLayer
from mixedprec_plugin.search.candidates import AS_STORED, Choices, Unit
from mixedprec_plugin.search.finder import Way
from mixedprec_plugin.search.kept import Basis, Scores, Wanted
from mixedprec_plugin.search.scores import input_rounding

# the server's arithmetic; of SGLang's backends for attention this one has float32 everywhere
_FLAGS = ("--dtype", "float32", "--attention-backend", "torch_native", "--disable-cuda-graph")


def way_of_engine(choices: Choices, basis: Basis) -> Way:
    """Scores by what an engine predicts, which is started once some are wanted."""

    def score(wanted: Wanted, progress: Progress) -> Iterator[Scores]:
        with tempfile.TemporaryDirectory(prefix="mixedprec-search-") as name:
            yield from measure_scores(choices, wanted, basis, Path(name), progress)

    return Way("measured", score, unmeasured(choices), can_measure)


def unmeasured(choices: Choices) -> dict[str, str]:
    """The units that cannot be measured, and why; an error, if the model is quantized itself."""
    quantized = [x.name for x in choices.base.layers if x.stored and not x.stored.is_float]
    if quantized:
        what = f"{choices.base.source.path} is quantized itself ({len(quantized)} layers)"
        remedy = "search with --inputs, which a server of this model gathers"
        raise UsageError(Problem("--in-engine", what, remedy))
    is_tied = ties_head(choices.base.source.config)
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


def measure_scores(
    choices: Choices, wanted: Wanted, basis: Basis, folder: Path, progress: Progress
) -> Iterator[Scores]:
    """Measure candidates of units that can be measured, a unit at a time, on the text of a basis.

    Args:
        folder: an empty one, for weights and the server's log.
    Raises:
        ServerError: the server does not start, or fails.
        CheckpointError, UsageError: a source is damaged, or the text no text.
    """
    source, target = choices.base.source, choices.base.target
    vocabulary = int(text_config(source.config)["vocab_size"])
    flags = ["--device", target.device, "--tp-size", str(target.tp_size), *_FLAGS]
    weights = folder / "weights"
    weights.mkdir()
    shutil.copy(source.path / "config.json", weights)
    with Reader() as reader:
        tokens: list[list[int]] = _text(choices, basis, reader, progress).tolist()
        with Server(source.path, folder / "server.log", flags=flags, is_quiet=True) as server:

            def predicted() -> Iterator[np.ndarray]:
                for window in tokens:
                    rows = distributions(server, window, vocabulary)
                    yield np.concatenate([own for _, own in rows])

            def take(layers: Sequence[PlannedLayer], compose: Compose) -> None:
                tensors = {
                    f"{x.name}.weight": compose(x, target, reader)["weight"].float().contiguous()
                    for x in layers
                }
                save_whole(tensors, weights / "model.safetensors", {"format": "pt"})
                server.update_weights(weights, load_format="safetensors")

            expected = list(predicted())
            task = progress.add_task("measuring", total=sum(map(len, wanted.values())))
            for name, candidates in wanted.items():
                unit, found = choices.units[name], {}
                for candidate in candidates:
                    take(unit.options[candidate].layers, compose_served)
                    found[candidate] = max(0.0, _divergence(expected, predicted()))
                    progress.advance(task)
                take(unit.layers, compose_floats)
                yield {name: found}
            progress.remove_task(task)


def _divergence(expected: Sequence[np.ndarray], found: Iterable[np.ndarray]) -> float:
    """KL in nats a token, of log-probabilities [T, V] of each window."""
    sums = count = 0.0
    for p, q in zip(expected, found, strict=True):
        sums += summed_kl(torch.from_numpy(p), torch.from_numpy(q))
        count += len(p)
    return sums / count


def _text(choices: Choices, basis: Basis, reader: Reader, progress: Progress) -> torch.Tensor:
    """The windows to measure on; only what writes its own needs a class of transformers."""
    if basis.text is not None:
        tokenizer = open_tokenizer(choices.base.source.path)
        return read_text(basis.text, tokenizer, basis.held_out, basis.length)
    return text_for(
        Network(choices.base, reader), None, basis.held_out, basis.length, basis.seed, progress
    )
