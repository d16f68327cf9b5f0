"""A real mixture of experts: equal to its dense model in bf16, and no worse mixed than predicted.

python -m benchmarks.experts [--tokens N] [--out FILE]

The mixture's experts are copies of the dense model's MLP, so that the mixture in bf16 is the dense
model, bit for bit, and a quarter of the experts in each of four schemes is about as far from it as
the dense model with its MLP in each of them is on average.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from benchmarks.engine_logprobs import distributions
from benchmarks.reference_model import load_reference, log_probabilities
from benchmarks.rounding import round_as_kernels
from demo.model import checkpoint
from demo.server import Server

PROSE = Path(__file__).with_name("data") / "prose.txt"
SCHEMES = ("bf16", "fp8_block", "awq", "gptq")


def served(
    model: Path, rules: Sequence[str], tokens: list[int], vocabulary_size: int
) -> torch.Tensor:
    """Serve a model with a preset of rules: log-probabilities float32 [T - 1, V]."""
    with tempfile.TemporaryDirectory() as folder:
        preset = write_preset(Path(folder), rules)
        with Server(model, Path(folder) / "server.log", preset) as server:
            rows = [part for _, part in distributions(server, tokens, vocabulary_size)]
    return torch.from_numpy(np.concatenate(rows))


def write_preset(folder: Path, rules: Sequence[str]) -> Path:
    """Write rules as a preset."""
    path = folder / "preset.yaml"
    lines = ["version: 1", "rules:", *(f"  - {{{rule}}}" for rule in rules)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    """Mean KL(p || q) in nats a token, of log-probabilities [T, V]."""
    return float((p.exp() * (p - q)).sum(-1).mean())


def perplexity(rows: torch.Tensor, tokens: list[int]) -> float:
    """exp of the mean negative log-probability of what follows."""
    return float(rows.gather(1, torch.tensor(tokens[1:])[:, None]).mean().neg().exp())


def mixed_rules() -> list[str]:
    """A quarter of the experts in each scheme."""
    return [f'match: "*.experts.{n}.*", method: {scheme}' for n, scheme in enumerate(SCHEMES)]


def reference(model: Path, rules: Sequence[str], tokens: list[int]) -> torch.Tensor:
    """The same preset in transformers, from weights that independent code dequantized."""
    with tempfile.TemporaryDirectory() as folder:
        made, _ = load_reference(model, write_preset(Path(folder), rules), torch.bfloat16)
    round_as_kernels(made)
    return log_probabilities(made, tokens)


def report(num_tokens: int) -> str:
    """Run everything, one server at a time."""
    dense, mixture = checkpoint("widened"), checkpoint("experts")
    tokenizer = AutoTokenizer.from_pretrained(dense)
    tokens = tokenizer(PROSE.read_text(encoding="utf-8"))["input_ids"][:num_tokens]
    size = AutoTokenizer.from_pretrained(dense).vocab_size
    plain = ['match: "*", method: unquantized']
    base = served(dense, plain, tokens, size)
    same = served(mixture, plain, tokens, size)
    mixed = served(mixture, mixed_rules(), tokens, size)
    is_same = "yes" if torch.equal(base, same) else "no"
    lines = [
        f"{len(tokens)} tokens of English prose; KL in nats a token.",
        "",
        "| served | perplexity | KL from dense bf16 | KL from its dequantized reference |",
        "|---|---|---|---|",
        f"| dense, bf16 | {perplexity(base, tokens):.3f} | | |",
        f"| 4 experts, bf16 | {perplexity(same, tokens):.3f} | {divergence(base, same):.5f} "
        f"(log-probabilities bit for bit the same: {is_same}) | |",
    ]
    alone = []
    for scheme in SCHEMES[1:]:
        rows = served(dense, [f'match: "*.mlp.*", method: {scheme}'], tokens, size)
        alone.append(divergence(base, rows))
        lines.append(
            f"| dense, MLP in {scheme} | {perplexity(rows, tokens):.3f} | {alone[-1]:.4f} | |"
        )
    own = divergence(reference(mixture, mixed_rules(), tokens), mixed)
    lines.append(
        f"| 4 experts, one in each of {', '.join(SCHEMES)} | {perplexity(mixed, tokens):.3f} "
        f"| {divergence(base, mixed):.4f} | {own:.4f} |"
    )
    predicted = sum(alone) / len(SCHEMES)
    lines += ["", f"Mean of the dense models, bf16 counted as 0: {predicted:.4f}."]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print the report; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experts")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--out", type=Path, help="write the table to this file as well")
    options = parser.parse_args(arguments)
    text = report(options.tokens)
    print(text)
    if options.out:
        options.out.write_text(
            f"# A real mixture of experts\n\n`make experts`. {text}\n", encoding="utf-8"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
