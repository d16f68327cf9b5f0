"""Compare what the engine computes for every shipped preset with an independent reference.

    python -m benchmarks.quality [--preset NAME ...] [--out docs/quality.md]

For each preset a server is started, and its log-probabilities of the prose in benchmarks/data, over
the whole vocabulary, are compared with those of a transformers model in fp32 that holds the same
weights, dequantized by code of its own (tests/reference). Where a method quantizes activations,
the reference does so too (benchmarks/activations.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import tempfile
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from benchmarks.engine_logprobs import distributions
from benchmarks.reference_model import (
    load_reference,
    load_unquantized,
    log_probabilities,
    noisy_log_probabilities,
)
from demo.model import checkpoint
from demo.server import Server

ROOT = Path(__file__).resolve().parents[1]
PRESETS = ROOT / "configs" / "presets"
PROSE = ROOT / "benchmarks" / "data" / "prose.txt"
UNQUANTIZED = "(bf16, no preset)"
WEIGHT_ONLY_LIMIT = 0.002
QUANTIZED_INPUT_LIMIT = 0.01
PERPLEXITY_TOLERANCE = 0.01
RUNS = 6


@dataclasses.dataclass(frozen=True)
class Result:
    """One preset's comparison.

    Attributes:
        bits_per_weight: over all weight matrices, scales counted.
        engine, reference, unquantized: perplexities; the last of the bf16 weights in fp32.
        divergence: mean KL(reference || engine) a token, in nats; the reference is the mean of its
            runs.
        to_one_run: the same from the reference's first run alone.
        floor: mean KL from the reference's first run to its second; None if there is only one.
        to_unquantized: mean KL(unquantized || engine), what the preset costs.
        limit: what the divergence must stay below.
        num_tokens: predicted tokens.
    """

    preset: str
    bits_per_weight: float
    engine: float
    reference: float
    unquantized: float
    divergence: float
    to_one_run: float
    floor: float | None
    to_unquantized: float
    limit: float
    num_tokens: int

    @property
    def is_within(self) -> bool:
        """Whether the divergence and the perplexities' ratio keep to their limits."""
        ratio = self.engine / self.reference
        return self.divergence < self.limit and abs(ratio - 1) < PERPLEXITY_TOLERANCE


@dataclasses.dataclass(frozen=True)
class Reference:
    """What the reference computes, over one or several runs.

    Attributes:
        mean: [T - 1, V], logarithm of the runs' mean probabilities.
        first: [T - 1, V], log-probabilities of the first run.
        loss: negative log-likelihood a token, mean over the runs.
        floor: mean KL from the first run to the second; None if there is only one.
    """

    mean: torch.Tensor
    first: torch.Tensor
    loss: float
    floor: float | None

    @classmethod
    def of_runs(cls, runs: Iterable[torch.Tensor], tokens: list[int]) -> Reference:
        """Average runs, each [T - 1, V] log-probabilities."""
        losses: list[float] = []
        total, floor = torch.empty(0), None
        for run in runs:
            if not losses:
                first, total = run, run.clone()
            else:
                if floor is None:
                    floor = _divergence(first, run) / len(run)
                torch.logaddexp(total, run, out=total)
            losses.append(_loss(run, tokens))
        total -= math.log(len(losses))
        return cls(total, first, sum(losses) / len(losses), floor)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write the table; return 1 if a preset is outside its limits."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality")
    parser.add_argument("--preset", action="append", help="name of a shipped preset; repeatable")
    parser.add_argument(
        "--out", type=Path, help="write the table here, and its numbers beside it as .json"
    )
    options = parser.parse_args(arguments)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    names = options.preset or [UNQUANTIZED, *sorted(path.stem for path in PRESETS.glob("*.yaml"))]
    known = _read(options.out)
    model_path = checkpoint("widened")
    tokens = AutoTokenizer.from_pretrained(model_path)(PROSE.read_text(encoding="utf-8"))[
        "input_ids"
    ]
    unquantized = log_probabilities(load_unquantized(model_path), tokens)
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        known[name] = measure(name, model_path, tokens, unquantized)
        print(table([known[name]]), flush=True)
        _write(options.out, known)
    return 0 if all(known[name].is_within for name in names) else 1


def measure(name: str, model_path: Path, tokens: list[int], unquantized: torch.Tensor) -> Result:
    """Compare one preset's server with its reference.

    Args:
        name: a shipped preset, or UNQUANTIZED for a stock server.
        tokens: T token ids.
        unquantized: [T - 1, V] log-probabilities of the bf16 weights in fp32.
    """
    preset_path, bits, limit = None, 16.0, WEIGHT_ONLY_LIMIT
    reference = Reference.of_runs([unquantized], tokens)
    if name != UNQUANTIZED:
        preset_path = PRESETS / f"{name}.yaml"
        model, stream = load_reference(model_path, preset_path)
        layers = [layer for layer in stream.plan.layers if layer.num_weights]
        bits = 8 * sum(x.bytes_after for x in layers) / sum(x.num_weights for x in layers)
        num_runs = 1
        if any(layer.method in ("fp8", "blockwise_int8") for layer in layers):
            num_runs, limit = RUNS, QUANTIZED_INPUT_LIMIT
        reference = Reference.of_runs(noisy_log_probabilities(model, tokens, num_runs), tokens)
        del model
    sums = np.zeros(4)
    with (
        tempfile.TemporaryDirectory(prefix="mixedprec-quality-") as folder,
        Server(model_path, Path(folder) / "server.log", preset_path) as server,
    ):
        for first, rows in distributions(server, tokens, reference.mean.shape[1]):
            sums += _sums(first, rows, tokens, reference, unquantized)
    count = len(tokens) - 1
    loss, divergence, to_one_run, to_unquantized = (float(value) / count for value in sums)
    return Result(
        preset=name,
        bits_per_weight=bits,
        engine=math.exp(loss),
        reference=math.exp(reference.loss),
        unquantized=math.exp(_loss(unquantized, tokens)),
        divergence=divergence,
        to_one_run=to_one_run,
        floor=reference.floor,
        to_unquantized=to_unquantized,
        limit=limit,
        num_tokens=count,
    )


def _sums(
    first: int,
    rows: np.ndarray,
    tokens: list[int],
    reference: Reference,
    unquantized: torch.Tensor,
) -> np.ndarray:
    """Sum over a window: negative log-likelihood; KL from the reference, one run, unquantized."""
    positions = slice(first - 1, first - 1 + len(rows))
    engine = torch.from_numpy(rows)
    targets = torch.tensor(tokens[first : first + len(rows)])
    loss = -engine.gather(1, targets[:, None]).double().sum()
    others = (reference.mean, reference.first, unquantized)
    return np.array([float(loss), *(_divergence(x[positions], engine) for x in others)])


def _divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    """Sum over rows of KL(p || q) in nats, from log-probabilities [n, V]."""
    return float((p.exp() * (p - q)).double().sum())


def _loss(log_probs: torch.Tensor, tokens: list[int]) -> float:
    """Mean negative log-likelihood of the tokens after the first."""
    return -float(log_probs.gather(1, torch.tensor(tokens[1:])[:, None]).double().mean())


def table(results: list[Result]) -> str:
    """Return the results as a markdown table."""
    lines = [
        "| preset | bits a weight | PPL engine | PPL reference | ratio | mean KL | limit "
        "| KL to one run | floor | PPL bf16 | mean KL to bf16 |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for x in results:
        mark = "" if x.is_within else " **over**"
        floor = "" if x.floor is None else f"{x.floor:.5f}"
        lines.append(
            f"| {x.preset} | {x.bits_per_weight:.2f} | {x.engine:.3f} | {x.reference:.3f} "
            f"| {x.engine / x.reference:.4f} | {x.divergence:.5f}{mark} | {x.limit} "
            f"| {x.to_one_run:.5f} | {floor} | {x.unquantized:.3f} | {x.to_unquantized:.4f} |"
        )
    return "\n".join(lines) + "\n"


def _read(path: Path | None) -> dict[str, Result]:
    if path is None or not path.with_suffix(".json").exists():
        return {}
    entries = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    return {entry["preset"]: Result(**entry) for entry in entries}


def _write(path: Path | None, results: dict[str, Result]) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = [results[name] for name in sorted(results)]
    numbers = json.dumps([dataclasses.asdict(x) for x in ordered], indent=1)
    path.with_suffix(".json").write_text(numbers + "\n", encoding="utf-8")
    path.write_text(_PAGE.format(
        tokens=f"{ordered[0].num_tokens:,}", sglang=version("sglang"), torch=version("torch"),
        transformers=version("transformers"), table=table(ordered),
        weight_only=WEIGHT_ONLY_LIMIT, quantized=QUANTIZED_INPUT_LIMIT, runs=RUNS,
    ), encoding="utf-8")  # fmt: skip


_PAGE = """# Quality

Written by `make quality`; the numbers are also in quality.json.

For every shipped preset a server runs the widened SmolLM2-135M-Instruct on the CPU platform
(SGLang {sglang}, torch {torch}), and gives its log-probabilities over the whole vocabulary of
49,152 tokens, nothing cut off, for {tokens} tokens of English prose (benchmarks/data/prose.txt),
each given all tokens before it.

- *reference*: a transformers {transformers} model in fp32 with the same weights, dequantized by
  independent numpy code (tests/reference/dequantize.py), and, where the method quantizes
  activations, linear layers that do the same (benchmarks/activations.py).
- *mean KL*: KL(reference || engine) a token, in nats. It must stay below {weight_only} for
  weight-only presets and {quantized} where activations are quantized, and the perplexities must
  agree within 1%. The first row is the floor: a stock bf16 server against fp32.
- *KL to one run*, *floor*: where activations are quantized the model is chaotic: noise of a
  millionth on the embeddings turns roundings over, and these turn over others. The floor is the
  mean KL between two runs of the reference itself that differ in nothing but such noise; no correct
  implementation can be expected to come closer to a single run. *Mean KL* is therefore taken from
  the mean distribution of {runs} such runs, and the KL to the first run alone stands beside it.
- *PPL bf16*, *mean KL to bf16*: the unquantized weights in fp32, and how far the preset is from
  them: what the preset costs on this very small model, without calibration.

{table}"""


if __name__ == "__main__":
    raise SystemExit(main())
