"""Servers of these tests, and how near two of them are.

The servers run on the GPU. MIXEDPREC_REHEARSAL=cpu runs what can run there on the CPU platform, to
try the tests themselves.
"""

from __future__ import annotations

import dataclasses
import math
import os
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from benchmarks import tensor_parallel
from benchmarks.reference_model import (
    divergence,
    load_reference,
    load_unquantized,
    windowed_log_probabilities,
)
from benchmarks.rounding import round_as_kernels
from mixedprec_plugin.evaluate.engine import WINDOW, distributions
from mixedprec_plugin.evaluate.server import Server
from tests.gpu.card import flags

PROMPTS = tensor_parallel.PROMPTS[:6]
NUM_TOKENS = 32
# of the prose that distributions are compared on: two windows
TEXT_TOKENS = 200

# A share of the memory that was free at the start is a wrong measure where others take some of it
# meanwhile: the cap decides.
_SMALL = {
    "--mem-fraction-static": ("0.5",),
    "--max-total-tokens": ("16384",),
    "--max-running-requests": ("4",),
}
_GRAPHS = {
    "--cuda-graph-bs-decode": ("1", "2", "4"),
    "--cuda-graph-bs-prefill": ("32", "160"),
    "--cuda-graph-max-bs-prefill": ("160",),
}
_NO_GRAPHS: dict[str, tuple[str, ...]] = {
    "--disable-decode-cuda-graph": (),
    "--disable-prefill-cuda-graph": (),
}
_LOG = {"--decode-log-interval": ("4",)}


def is_rehearsal() -> bool:
    """Whether the tests are tried on the CPU platform."""
    return os.environ.get("MIXEDPREC_REHEARSAL") == "cpu"


def serve(
    model: Path,
    log_path: Path,
    preset: Path | None = None,
    *more: str,
    with_graphs: bool = True,
) -> Server:
    """A server that leaves room for others on its GPU, not started yet."""
    chosen = _LOG if is_rehearsal() else _LOG | _SMALL | (_GRAPHS if with_graphs else _NO_GRAPHS)
    said = [word for flag, values in chosen.items() for word in (flag, *values)]
    return Server(model, log_path, preset, [*flags(), *said, *more])


def flush(server: Server) -> None:
    """Empty the prefix cache; the answer is no JSON, and an error where it was not done."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{server.port}/flush_cache?timeout=30", timeout=60) as done:
        assert done.status == 200, done.read()


class Adapted:
    """A server whose every request is for an adapter."""

    def __init__(self, server: Server, name: str) -> None:
        self.server, self.name = server, name

    def request(self, path: str, body: Any = None, timeout: float = 300.0) -> Any:
        """As the server's own."""
        return self.server.request(path, {**body, "lora_path": self.name}, timeout)


@dataclasses.dataclass(frozen=True)
class Continuation:
    """What a server generated greedily.

    Attributes:
        tokens: token ids.
        best: of each step the log-probabilities of the most probable tokens.
    """

    tokens: list[int]
    best: list[dict[int, float]]

    def gap(self, step: int, token: int) -> float:
        """How much less probable a token was than the one taken, in nats."""
        found = self.best[step]
        return found[self.tokens[step]] - found.get(token, -math.inf)


def continuations(server: Any, num_tokens: int = NUM_TOKENS) -> list[Continuation]:
    """Continue every prompt greedily, one after the other."""
    made = []
    for prompt in PROMPTS:
        sampling = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
        body = {"text": prompt, "sampling_params": sampling}
        meta = server.request(
            "/generate", {**body, "return_logprob": True, "top_logprobs_num": 10}
        )["meta_info"]
        tokens = [int(entry[1]) for entry in meta["output_token_logprobs"]]
        best = [{int(e[1]): float(e[0]) for e in row} for row in meta["output_top_logprobs"]]
        for row, entry in zip(best, meta["output_token_logprobs"], strict=True):
            row[int(entry[1])] = float(entry[0])
        assert len(tokens) == num_tokens, tokens
        made.append(Continuation(tokens, best))
    return made


def near_tie(limit: float) -> float:
    """How far the distance of two tokens may move, in nats, from one correct run to another.

    A small KL is half the variance of the difference of log-probabilities, which is then
    sqrt(2 KL); the difference of two tokens' is sqrt(2) times that; three standard deviations.

    Args:
        limit: the KL that two correct runs may be apart.
    """
    return 3 * math.sqrt(2) * math.sqrt(2 * limit)


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Of two servers' continuations, up to the first token that differs in each.

    Attributes:
        num_equal: prompts whose tokens are all the same.
        gaps: of the others, how far the two tokens' distance moved from one run to the other.
        shift: greatest difference of the log-probability of a token that both took.
    """

    num_equal: int
    gaps: list[float]
    shift: float

    def __str__(self) -> str:
        gaps = ", ".join(f"{gap:.3f}" for gap in self.gaps)
        text = f"{self.num_equal} of {len(PROMPTS)} prompts' {NUM_TOKENS} tokens equal"
        text += f", others part where {gaps} nats moved" if gaps else ""
        return f"{text}, log-probabilities differ by at most {self.shift:.4f}"

    def is_explained(self, limit: float) -> bool:
        """Whether only near ties went the other way."""
        return all(gap <= near_tie(limit) for gap in self.gaps)


def agreement(ours: Sequence[Continuation], theirs: Sequence[Continuation]) -> Agreement:
    """Compare what two servers generated from the same prompts."""
    gaps, shift = [], 0.0
    for one, other in zip(ours, theirs, strict=True):
        for step, (token, another) in enumerate(zip(one.tokens, other.tokens, strict=True)):
            if token != another:
                gaps.append(one.gap(step, another) + other.gap(step, token))
                break
            shift = max(shift, abs(one.best[step][token] - other.best[step][token]))
    return Agreement(len(ours) - len(gaps), gaps, shift)


def check_same(
    ours: Sequence[Continuation],
    theirs: Sequence[Continuation],
    limit: float,
    what: str,
    report: list[str],
) -> None:
    found = agreement(ours, theirs)
    report.append(f"{what}: {found}")
    assert found.is_explained(limit), f"{what}: {found} (expected at most {near_tie(limit):.3f})"


@dataclasses.dataclass(frozen=True)
class Nearness:
    """How far a server's distributions are from those of dequantized weights.

    Attributes:
        rounded, exact: mean KL(reference || server) a token in nats, of a reference in bf16 that
            rounds where SGLang does, and of one that rounds nothing but what the methods round.
        spread: from the one reference to the other. Both are correct: where activations are
            quantized, a rounding that turns over makes others do so.
        limit: what the distance must stay below, or else below half as much again as the spread.
    """

    rounded: float
    exact: float
    spread: float
    limit: float

    @property
    def is_within(self) -> bool:
        """Whether the server is as near to a reference as a correct one is."""
        return min(self.rounded, self.exact) < max(self.limit, 1.5 * self.spread)

    def __str__(self) -> str:
        return (
            f"mean KL {self.rounded:.5f} from bf16, {self.exact:.5f} from fp32, "
            f"which are {self.spread:.5f} apart (limit {self.limit})"
        )


@dataclasses.dataclass(frozen=True)
class Expected:
    """What dequantized weights say of a text.

    Attributes:
        tokens: T token ids.
        rounded, exact: log-probabilities float32 [T - 1, V], as in `Nearness`.
    """

    tokens: list[int]
    rounded: torch.Tensor
    exact: torch.Tensor

    def served(self, server: Any) -> torch.Tensor:
        """Log-probabilities float32 [T - 1, V] of a server."""
        found = distributions(server, self.tokens, self.exact.shape[1])
        return torch.from_numpy(np.concatenate([rows for _, rows in found]))

    def nearness(self, served: torch.Tensor, limit: float) -> Nearness:
        """Compare with a server's log-probabilities."""
        return Nearness(
            divergence(self.rounded, served),
            divergence(self.exact, served),
            divergence(self.exact, self.rounded),
            limit,
        )


def expected(
    model: Path, preset: Path | None, text: str, change: Callable[[Any], None] | None = None
) -> Expected:
    """Ask transformers, on the preset's weights dequantized by independent code.

    Args:
        preset: None for the weights as they are.
        change: what is done to the model before.
    """
    tokens = AutoTokenizer.from_pretrained(model)(text)["input_ids"][:TEXT_TOKENS]
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        if preset is None:
            reference = load_unquantized(model, dtype)
        else:
            reference, _ = load_reference(model, preset, dtype)
        if change is not None:
            change(reference)
        if dtype == torch.bfloat16:
            round_as_kernels(reference)
        found.append(windowed_log_probabilities(reference, tokens, WINDOW))
    return Expected(tokens, *found)


def perplexity(server: Server, model: Path, text: str) -> float:
    """Perplexity of a text, as the server reads it at once."""
    tokens = AutoTokenizer.from_pretrained(model)(text)["input_ids"]
    answer = server.request(
        "/generate",
        {
            "input_ids": tokens,
            "sampling_params": {"max_new_tokens": 1, "temperature": 0},
            "return_logprob": True,
            "logprob_start_len": 0,
        },
    )
    found = [
        value for value, *_ in answer["meta_info"]["input_token_logprobs"] if value is not None
    ]
    assert len(found) == len(tokens) - 1
    return math.exp(-sum(found) / len(found))
