"""A real mixture of experts: equal to its dense model in bf16, and no worse mixed than predicted.

    python -m benchmarks.experts [--tokens N] [--out docs/experts.md]

The mixture's experts are copies of the dense model's MLP and a token's weights sum to one, so that
the mixture in bf16 computes what the dense model does, whatever its routers say.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from benchmarks.engine_logprobs import WINDOW, distributions
from benchmarks.reference_model import (
    load_reference,
    load_unquantized,
    windowed_log_probabilities,
)
from benchmarks.rounding import round_as_kernels
from demo.experts import NUM_EXPERTS
from demo.model import checkpoint
from demo.server import Server

PROSE = Path(__file__).with_name("data") / "prose.txt"
# of expert 0, 1, 2 and 3 of each layer
SCHEMES = ("bf16", "fp8_block", "awq", "gptq_int4")
WEIGHT_ONLY = ("bf16", "awq", "gptq_int4", "gptq_int8")
LIMIT, WEIGHT_ONLY_LIMIT = 0.01, 0.002
# how many tokens are read one after the other
NUM_NARROW = 500
ONE_BY_ONE = ("--chunked-prefill-size", "1")
PLAIN = ('match: "*", method: unquantized',)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The mixture with its experts in four schemes.

    Attributes:
        perplexity: of the served model.
        cost: mean KL from the dense model in bf16.
        error: mean KL from the same weights, dequantized by other code.
        predicted: what the cost stays below; see `predict`.
        limit: what the error stays below.
    """

    schemes: tuple[str, ...]
    perplexity: float
    cost: float
    error: float
    predicted: float
    limit: float

    @property
    def is_within(self) -> bool:
        """Whether it keeps to both."""
        return self.cost <= self.predicted and self.error < self.limit


def served(
    model: Path,
    rules: Sequence[str],
    tokens: list[int],
    vocabulary_size: int,
    flags: Sequence[str] = (),
) -> torch.Tensor:
    """Serve a model with a preset of rules: log-probabilities float32 [T - 1, V]."""
    with tempfile.TemporaryDirectory() as folder:
        preset = write_preset(Path(folder), rules)
        with Server(model, Path(folder) / "server.log", preset, flags) as server:
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
    return float((p.exp() * (p - q)).sum(-1).double().mean())


def perplexity(rows: torch.Tensor, tokens: list[int]) -> float:
    """exp of the mean negative log-probability of what follows."""
    return float(rows.gather(1, torch.tensor(tokens[1:])[:, None]).double().mean().neg().exp())


def mixed_rules(schemes: Sequence[str]) -> list[str]:
    """A quarter of the experts in each scheme."""
    return [f'match: "*.experts.{n}.*", method: {scheme}' for n, scheme in enumerate(schemes)]


def reference(model: Path, rules: Sequence[str], tokens: list[int]) -> torch.Tensor:
    """The same preset in transformers, from weights that independent code dequantized."""
    with tempfile.TemporaryDirectory() as folder:
        made, _ = load_reference(model, write_preset(Path(folder), rules), torch.bfloat16)
    round_as_kernels(made)
    return windowed_log_probabilities(made, tokens, WINDOW)


def router_shares(model: Path, tokens: list[int]) -> list[float]:
    """The part of the routers' weights that each expert gets, over all tokens and layers."""
    made = load_unquantized(model, torch.bfloat16)
    totals = torch.zeros(NUM_EXPERTS)

    def add(_router: Any, _args: Any, out: tuple[torch.Tensor, ...]) -> None:
        _, weights, ids = out
        totals.index_add_(0, ids.flatten(), weights.flatten().float())

    for layer in made.model.layers:
        layer.mlp.gate.register_forward_hook(add)
    with torch.inference_mode():
        made(torch.tensor([tokens]))
    return [float(share) for share in totals / totals.sum()]


def predict(shares: Sequence[float], schemes: Sequence[str], alone: dict[str, float]) -> float:
    """Mean cost of the dense models, each counted as often as a token meets its scheme.

    An expert in a scheme is off by what the dense MLP is off by in that scheme, and a token gets
    the weighted mean of two. The cost grows with the square of what a layer is off by; the square
    of a mean is at most the mean of the squares. So this is what the mixture stays below.
    """
    return sum(share * alone[scheme] for share, scheme in zip(shares, schemes, strict=True))


def report(num_tokens: int) -> tuple[str, bool]:
    """Run everything, one server at a time; the page, and whether all is as it should be."""
    dense, mixture = checkpoint("widened"), checkpoint("experts")
    tokenizer = AutoTokenizer.from_pretrained(dense)
    tokens = tokenizer(PROSE.read_text(encoding="utf-8"))["input_ids"][:num_tokens]
    size = tokenizer.vocab_size
    base = served(dense, PLAIN, tokens, size)
    plain = served(mixture, PLAIN, tokens, size)
    few = tokens[: NUM_NARROW + 1]
    is_same = torch.equal(
        served(dense, PLAIN, few, size, ONE_BY_ONE), served(mixture, PLAIN, few, size, ONE_BY_ONE)
    )
    rows = [
        f"| dense, bf16 | {perplexity(base, tokens):.3f} | | | |",
        f"| 4 experts, bf16 | {perplexity(plain, tokens):.3f} "
        f"| {divergence(base, plain):.5f} | | |",
    ]
    alone = {"bf16": 0.0}
    for scheme in dict.fromkeys([*SCHEMES[1:], *WEIGHT_ONLY[1:]]):
        got = served(dense, [f'match: "*.mlp.*", method: {scheme}'], tokens, size)
        alone[scheme] = divergence(base, got)
        cells = f"{perplexity(got, tokens):.3f} | {alone[scheme]:.5f}"
        rows.append(f"| dense, MLP in {scheme} | {cells} | | |")
    mixed = {
        schemes: served(mixture, mixed_rules(schemes), tokens, size)
        for schemes in (SCHEMES, WEIGHT_ONLY)
    }
    shares = router_shares(mixture, tokens)
    mixtures = []
    for (schemes, got), limit in zip(mixed.items(), (LIMIT, WEIGHT_ONLY_LIMIT), strict=True):
        made = Mixture(
            schemes,
            perplexity(got, tokens),
            divergence(base, got),
            divergence(reference(mixture, mixed_rules(schemes), tokens), got),
            predict(shares, schemes, alone),
            limit,
        )
        mixtures.append(made)
        rows.append(
            f"| 4 experts, one in each of {', '.join(schemes)} | {made.perplexity:.3f} "
            f"| {made.cost:.5f} | {made.predicted:.5f} | {made.error:.5f} (limit {limit}) |"
        )
    text = _PAGE.format(
        tokens=len(tokens),
        narrow=len(few) - 1,
        same="are the same, bit for bit" if is_same else "**differ**",
        rows="\n".join(rows),
        shares=", ".join(f"{share:.3f}" for share in shares),
        sglang=version("sglang"),
        torch=version("torch").partition("+")[0],
    )
    return text, is_same and all(made.is_within for made in mixtures)


_PAGE = """# A real mixture of experts

Written by `make experts`: SmolLM2-135M-Instruct, widened, and the same as a mixture of four experts
a layer, of which a token gets two. Each expert is a copy of the dense MLP and a token's weights sum
to one. Served by SGLang {sglang} on the CPU platform (torch {torch}); {tokens:,} tokens of English
prose, over the whole vocabulary; KL in nats a token.

| served | perplexity | KL from dense bf16 | predicted | KL from its dequantized reference |
|---|--:|--:|--:|--:|
{rows}

- **The mixture in bf16 is the dense model.** Where a forward is one token wide, so that an expert
  multiplies as many rows as the dense MLP does, the log-probabilities of both {same}: over {narrow}
  tokens, with `--chunked-prefill-size 1`. In a wider forward an expert sees fewer rows than the
  dense MLP, and the bits of torch's bf16 product of a row depend on how many rows there are: that
  is the KL of the second line.
- **predicted**: the mean of the dense models' KL, each counted by the part of the routers' weights
  that its expert gets ({shares}). An expert is off by what the dense MLP is off by in that scheme,
  and a token gets the weighted mean of two experts. A small KL grows with the square of what the
  layers are off by, and the square of a mean is at most the mean of the squares: the mixture must
  stay below.
- **dequantized reference**: transformers in bf16 with the same weights, dequantized by independent
  code, and activations quantized where the method does so, as for docs/quality.md.
"""


def main(arguments: list[str] | None = None) -> int:
    """Print the page; return 1 if something in it is not as it should be."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experts")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--out", type=Path, help="write the page to this file as well")
    options = parser.parse_args(arguments)
    text, is_good = report(options.tokens)
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    return 0 if is_good else 1


if __name__ == "__main__":
    raise SystemExit(main())
