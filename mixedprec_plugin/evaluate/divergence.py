"""How far the predictions of quantized models are from the unquantized one's, on a text.

In transformers they run a decoder layer at a time, with the weights that they are served with,
dequantized; activations are not quantized. Served, they run in SGLang's kernels, one by one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch

from mixedprec_plugin.calibrate.network import Network
from mixedprec_plugin.calibrate.sweep import Sweep
from mixedprec_plugin.errors import CheckpointError, Problem
from mixedprec_plugin.evaluate.engine import distributions
from mixedprec_plugin.evaluate.server import Server

# window -> logits, or their logarithms of probabilities: [length or one less, vocabulary]
Predictions = Callable[[int], torch.Tensor]

# logits of so many tokens are in memory at once, of each of two models
_HEAD_TOKENS = 512


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean over windows of text, with its standard error (None for a single window)."""

    value: float
    error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """The mean of a value for each window."""
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
        return cls(statistics.fmean(values), error)


@dataclasses.dataclass(frozen=True)
class Divergence:
    """What one model's predictions are like.

    Attributes:
        kl: KL(reference || model) in nats a token.
        log_likelihood: of the text, mean negative, in nats a token; its exponential is perplexity.
        top1: share of tokens whose likeliest successor is the reference's.
        windows: KL of each window.
    """

    kl: Mean
    log_likelihood: Mean
    top1: Mean
    windows: tuple[float, ...]


def divergences(
    reference: Network,
    models: Mapping[str, Network],
    tokens: torch.Tensor,
    folder: Path,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Divergence]:
    """Compare models with a reference, the reference itself first, by the name "".

    Args:
        tokens: int64 [windows, length].
        folder: an empty one for hidden states.
        progress: called after each decoder layer of each model.
    Raises:
        CheckpointError: a model's predictions are NaN, or the text impossible to it.
    """
    networks = {"": reference, **models}
    hidden = {
        name: _run(network, tokens, folder / str(number), progress)
        for number, (name, network) in enumerate(networks.items())
    }
    found = {}
    for name, network in networks.items():
        with _predictions(reference, tokens, hidden[""]) as expected, contextlib.ExitStack() as own:
            made = expected
            if network is not reference:
                made = own.enter_context(_predictions(network, tokens, hidden[name]))
            found[name] = _compare(expected, made, tokens, name)
    return found


def served_divergences(
    reference: Network,
    servers: Mapping[str, Callable[[Path], AbstractContextManager[Server]]],
    tokens: torch.Tensor,
    folder: Path,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Divergence]:
    """Compare what servers predict with a reference, which runs in transformers.

    Args:
        servers: name -> a server that writes its log to a file; one runs at a time.
        tokens: int64 [windows, length].
        folder: an empty one for hidden states and logs.
        progress: called after each decoder layer of the reference, and each window of a server.
    Raises:
        ServerError: a server does not start, or fails.
        CheckpointError: as `divergences`.
    """
    hidden = _run(reference, tokens, folder / "reference", progress)
    vocabulary = reference.model.config.get_text_config().vocab_size
    found = {}
    for number, (name, start) in enumerate(servers.items()):
        with start(folder / f"{number}.log") as server:

            def made(window: int, server: Server = server) -> torch.Tensor:
                rows = distributions(server, tokens[window].tolist(), vocabulary)
                whole = np.concatenate([own for _, own in rows])
                progress()
                return torch.from_numpy(whole)

            with _predictions(reference, tokens, hidden) as expected:
                found[name] = _compare(expected, made, tokens, name)
    return found


def _run(
    network: Network, tokens: torch.Tensor, folder: Path, progress: Callable[[], None]
) -> torch.Tensor:
    """The states behind the last decoder layer, [windows, length, hidden size]."""
    folder.mkdir()
    return Sweep(network, tokens, folder).forward(lambda _: progress())


@contextlib.contextmanager
def _predictions(
    network: Network, tokens: torch.Tensor, hidden: torch.Tensor
) -> Iterator[Predictions]:
    """Hold what makes logits of hidden states."""

    def logits(window: int) -> torch.Tensor:
        states = hidden[window][None].to(network.device)
        return network.logits(tokens[window][None].to(network.device), states)[0]

    with network.loaded(None), torch.no_grad():
        yield logits


def _compare(
    expected: Predictions, made: Predictions, tokens: torch.Tensor, name: str
) -> Divergence:
    rows = []
    for window, own in enumerate(tokens):
        first = expected(window)
        rows.append(_compare_window(first, first if made is expected else made(window), own))
    kl, likelihood, top1 = zip(*rows, strict=True)
    if not all(map(math.isfinite, (*kl, *likelihood))):
        what = "its predictions are NaN, or rule out what the unquantized model predicts"
        remedy = "its weights, or the unquantized model's, are damaged; hold them against an "
        remedy += "original with mixedprec verify"
        raise CheckpointError(Problem(name or "reference", what, remedy, "predictions"))
    return Divergence(Mean.of(kl), Mean.of(likelihood), Mean.of(top1), tuple(kl))


def _compare_window(
    expected: torch.Tensor, made: torch.Tensor, tokens: torch.Tensor
) -> tuple[float, float, float]:
    """KL, negative log-likelihood and agreement, means over the tokens of a window."""
    kl = likelihood = same = 0.0
    count = len(tokens) - 1
    for first in range(0, count, _HEAD_TOKENS):
        at = slice(first, min(first + _HEAD_TOKENS, count))
        p, q = (x[at].to(expected.device).float().log_softmax(-1) for x in (expected, made))
        kl += summed_kl(p, q)
        following = tokens[at.start + 1 : at.stop + 1, None].to(q.device)
        likelihood -= float(q.gather(1, following).sum(dtype=torch.float64))
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
    return kl / count, likelihood / count, same / count


def summed_kl(p: torch.Tensor, q: torch.Tensor) -> float:
    """KL(p || q) in nats, summed over tokens, of log-probabilities float32 [T, V]."""
    # what the reference never predicts adds nothing, also where the other one is as sure
    terms = torch.where(p == -math.inf, 0.0, p.exp() * (p - q))
    return float(terms.sum(dtype=torch.float64))
