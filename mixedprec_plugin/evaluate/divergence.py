"""How far the predictions of quantized models are from the unquantized one's, on a text.

Models run a decoder layer at a time in transformers, with the weights that they are served with,
dequantized; activations are not quantized. At the end each model's logits are made for a few tokens
at a time, beside the reference's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from mixedprec_plugin.calibrate.network import Network
from mixedprec_plugin.calibrate.sweep import Sweep

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
        count = len(values)
        mean = math.fsum(values) / count
        if count < 2:
            return cls(mean, None)
        variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
        return cls(mean, math.sqrt(variance / count))


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
    """
    networks = {"": reference, **models}
    hidden = {}
    for number, (name, network) in enumerate(networks.items()):
        own = folder / str(number)
        own.mkdir()
        hidden[name] = Sweep(network, tokens, own).forward(lambda _: progress())
    found = {}
    for name, network in networks.items():
        rows = []
        with contextlib.ExitStack() as stack, torch.no_grad():
            for one in {id(x): x for x in (reference, network)}.values():
                stack.enter_context(one.loaded(None))
            for window, own in enumerate(tokens):
                expected = _logits(reference, own, hidden[""][window])
                made = _logits(network, own, hidden[name][window])
                rows.append(_compare(expected, made, own))
        kl, likelihood, top1 = zip(*rows, strict=True)
        found[name] = Divergence(Mean.of(kl), Mean.of(likelihood), Mean.of(top1), tuple(kl))
    return found


def _logits(network: Network, tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    states = hidden[None].to(network.device, network.model.dtype)
    return network.logits(tokens[None].to(network.device), states)[0]


def _compare(
    expected: torch.Tensor, made: torch.Tensor, tokens: torch.Tensor
) -> tuple[float, float, float]:
    """KL, negative log-likelihood and agreement, means over the tokens of a window."""
    kl = likelihood = same = 0.0
    count = len(tokens) - 1
    for first in range(0, count, _HEAD_TOKENS):
        at = slice(first, min(first + _HEAD_TOKENS, count))
        p, q = (logits[at].float().log_softmax(-1) for logits in (expected, made))
        kl += float((p.exp() * (p - q)).sum(dtype=torch.float64))
        following = tokens[at.start + 1 : at.stop + 1, None].to(q.device)
        likelihood -= float(q.gather(1, following).sum(dtype=torch.float64))
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
    return kl / count, likelihood / count, same / count
