"""A real mixture of experts: equal to its dense model in bf16, and no worse mixed than predicted.

    python -m benchmarks.experts [--tokens N] [--out docs/experts.md]

The mixture's experts are copies of the dense model's MLP and a token's weights sum to one, so that
the mixture in bf16 computes what the dense model does, whatever its routers say.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoTokenizer

from benchmarks.families import engine
from benchmarks.families.processes import forked
from benchmarks.figures import Figure, keep
from benchmarks.reference_model import divergence, load_reference, log_probabilities, perplexity
from benchmarks.rounding import round_as_kernels
from demo.model import checkpoint
from mixedprec_plugin.evaluate.server import free_port

PROSE = Path(__file__).with_name("data") / "prose.txt"
# of expert 0, 1, 2 and 3 of each layer
SCHEMES = ("bf16", "fp8_block", "awq", "gptq_int4")
WEIGHT_ONLY = ("bf16", "awq", "gptq_int4", "gptq_int8")
LIMIT, WEIGHT_ONLY_LIMIT = 0.01, 0.002
# of all experts, and what the distance from their reference stays below
ALIKE = {"mxfp4": WEIGHT_ONLY_LIMIT, "nvfp4": WEIGHT_ONLY_LIMIT, "int8_channel": LIMIT}
NUM_LAYERS = 30
# how many tokens are read one after the other
NUM_NARROW = 500
_MINUTES = 1800.0
PLAIN = ('match: "*", method: unquantized',)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The mixture with its experts in four schemes.

    Attributes:
        perplexity: of the served model.
        cost: mean KL from the dense model in bf16.
        error: mean KL from the same weights, dequantized by other code.
        predicted: costs of dense models in the same schemes; see `predict`.
        limit: what the error stays below.
    """

    schemes: tuple[str, ...]
    perplexity: float
    cost: float
    error: float
    predicted: tuple[float, ...]
    limit: float

    @property
    def is_within(self) -> bool:
        """Whether it costs no more than the dense models, and keeps to its limit."""
        return self.cost <= max(self.predicted) and self.error < self.limit


def served(
    model: Path, rules: Sequence[str], tokens: list[int], *, one_by_one: bool = False
) -> torch.Tensor:
    """Serve a model with a preset of rules: log-probabilities float32 [T, V] after each token.

    Args:
        one_by_one: have each token in a forward of its own, and not all in one.
    """
    prompt, forced = (tokens[:1], tokens[1:]) if one_by_one else (tokens, [])
    with tempfile.TemporaryDirectory() as name:
        preset = write_preset(Path(name), rules)
        work = functools.partial(_serve, model, preset, prompt, forced)
        (rows,) = forked([work], Path(name), timeout_seconds=_MINUTES)
    made: torch.Tensor = rows
    return made


def _serve(model: Path, preset: Path, prompt: list[int], forced: list[int]) -> torch.Tensor:
    args = engine.server_args(model, preset, 1, max_total_tokens=4096)
    out = engine.serve(args, free_port(), 0, prompt, len(forced), forced, is_traced=False)
    return torch.log_softmax(out["logits"], -1)


def write_preset(folder: Path, rules: Sequence[str]) -> Path:
    """Write rules as a preset."""
    path = folder / "preset.yaml"
    lines = ["version: 1", "rules:", *(f"  - {{{rule}}}" for rule in rules)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def mixed_rules(schemes: Sequence[str]) -> list[str]:
    """A quarter of the experts in each scheme."""
    return [f'match: "*.experts.{n}.*", method: {scheme}' for n, scheme in enumerate(schemes)]


def reference(model: Path, rules: Sequence[str], tokens: list[int]) -> torch.Tensor:
    """The same preset in transformers, from weights that independent code dequantized."""
    with tempfile.TemporaryDirectory() as folder:
        made, _ = load_reference(model, write_preset(Path(folder), rules), torch.bfloat16)
    round_as_kernels(made)
    return log_probabilities(made, tokens)


def dealt_rules(schemes: Sequence[str], first: int) -> list[str]:
    """A quarter of a dense model's MLPs in each scheme: layers take turns, beginning with one."""
    rules = []
    for number, scheme in enumerate(schemes):
        layers = ",".join(
            str(layer) for layer in range(NUM_LAYERS) if (layer + first) % len(schemes) == number
        )
        rules.append(f'match: "model.layers.{{{layers}}}.mlp.*", method: {scheme}')
    return rules


def predict(
    dense: Path, schemes: Sequence[str], base: torch.Tensor, given: list[int]
) -> tuple[float, ...]:
    """KL of dense models whose layers are dealt to the schemes, for each way to begin.

    There a token meets each scheme in a quarter of the layers, with the whole of its error. In the
    mixture it meets in every layer the weighted mean of two experts, whose errors' square is at
    most the mean of their squares; which scheme it meets most in a layer is up to the router.
    """
    return tuple(
        divergence(base, served(dense, dealt_rules(schemes, first), given))
        for first in range(len(schemes))
    )


def mixture_row(made: Mixture) -> str:
    """One line of the table."""
    least, mean = min(made.predicted), sum(made.predicted) / len(made.predicted)
    return (
        f"| 4 experts, one in each of {', '.join(made.schemes)} | {made.perplexity:.3f} "
        f"| {made.cost:.4f} | {mean:.4f} ({least:.4f} to {max(made.predicted):.4f}) "
        f"| {made.error:.5f} (limit {made.limit}) |"
    )


def report(num_tokens: int) -> tuple[str, bool, list[Figure]]:
    """Run everything, one server at a time; the page, and whether a lone token is the same."""
    dense, mixture = checkpoint("widened"), checkpoint("experts")
    tokenizer = AutoTokenizer.from_pretrained(dense)
    tokens = tokenizer(PROSE.read_text(encoding="utf-8"))["input_ids"][:num_tokens]
    given, few = tokens[:-1], tokens[:NUM_NARROW]
    is_same = torch.equal(
        served(dense, PLAIN, few, one_by_one=True), served(mixture, PLAIN, few, one_by_one=True)
    )
    base = served(dense, PLAIN, given)
    plain = served(mixture, PLAIN, given)
    rows = [
        f"| dense, bf16 | {perplexity(base, tokens):.3f} | | | |",
        f"| 4 experts, bf16 | {perplexity(plain, tokens):.3f} "
        f"| {divergence(base, plain):.5f} | | |",
    ]
    for scheme in dict.fromkeys([*SCHEMES[1:], *WEIGHT_ONLY[1:]]):
        got = served(dense, [f'match: "*.mlp.*", method: {scheme}'], given)
        cells = f"{perplexity(got, tokens):.3f} | {divergence(base, got):.5f}"
        rows.append(f"| dense, MLP in {scheme} | {cells} | | |")
    figures = []
    for scheme, limit in ALIKE.items():
        rules = [f'match: "*.experts.*", method: {scheme}']
        got = served(mixture, rules, given)
        error = divergence(reference(mixture, rules, tokens), got)
        cells = f"{perplexity(got, tokens):.3f} | {divergence(base, got):.5f}"
        rows.append(f"| 4 experts, all in {scheme} | {cells} | | {error:.5f} (limit {limit}) |")
        figures.append(Figure(f"{scheme}, KL from its reference", error, limit=limit))
    mixed = {
        schemes: served(mixture, mixed_rules(schemes), given) for schemes in (SCHEMES, WEIGHT_ONLY)
    }
    mixtures = []
    for (schemes, got), limit in zip(mixed.items(), (LIMIT, WEIGHT_ONLY_LIMIT), strict=True):
        made = Mixture(
            schemes,
            perplexity(got, tokens),
            divergence(base, got),
            divergence(reference(mixture, mixed_rules(schemes), tokens), got),
            predict(dense, schemes, base, given),
            limit,
        )
        mixtures.append(made)
        rows.append(mixture_row(made))
    text = _PAGE.format(
        tokens=len(tokens),
        narrow=len(few),
        same="are the same, bit for bit" if is_same else "**differ**",
        rows="\n".join(rows),
        sglang=version("sglang"),
        torch=version("torch").partition("+")[0],
    )
    for made in mixtures:
        name = " + ".join(made.schemes)
        most = max(made.predicted)
        figures.append(Figure(f"{name}, KL from dense bf16", made.cost, most, most))
        figures.append(Figure(f"{name}, KL from its reference", made.error, limit=made.limit))
    return text, is_same, figures


_PAGE = """# A real mixture of experts

Written by `make experts`: SmolLM2-135M-Instruct, widened, and the same as a mixture of four experts
a layer, of which a token gets two. Each expert is a copy of the dense MLP and a token's weights sum
to one. Run by SGLang {sglang}'s model runner on the CPU platform (torch {torch}); {tokens:,} tokens
of English prose in one forward, over the whole vocabulary; KL in nats a token.
`tests/server/test_experts.py` holds servers of the two mixtures against their references.

| served | perplexity | KL from dense bf16 | predicted | KL from its dequantized reference |
|---|--:|--:|--:|--:|
{rows}

- **The mixture in bf16 is the dense model.** Where a forward is one token wide, so that an expert
  multiplies as many rows as the dense MLP does, the log-probabilities of both {same}:
  over {narrow} tokens, one after the other. In a wider forward an expert sees fewer rows than the
  dense MLP, and the bits of torch's bf16 product of a row depend on how many rows there are: that
  is the KL of the second line. Unquantized layers are SGLang's own on the CPU platform, so nothing
  is done about it.
- **predicted**: KL of four dense models whose layers take turns in the schemes, a quarter of the
  MLPs in each, which differ in the scheme of the first layer; their mean, and the least and the
  greatest. There a token meets each scheme in a quarter of the layers, with the whole of its error.
  In the mixture it meets the weighted mean of two experts in every layer, and the square of a mean
  is at most the mean of the squares. Which scheme it meets most in which layer is up to the random
  routers, and matters as much as it does among the four: the mixture must stay below the greatest.
- **dequantized reference**: transformers in bf16 with the same weights, dequantized by independent
  code, and activations quantized where the method does so, as for docs/quality.md.
"""


def main(arguments: list[str] | None = None) -> int:
    """Measure, and write the page; return 1 if something in it is not as it should be."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experts")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--out", type=Path, help="write the page to this file")
    options = parser.parse_args(arguments)
    # one thread: what has threads cannot be forked
    os.environ["OMP_NUM_THREADS"] = "1"
    engine.warm_up()
    text, is_same, figures = report(options.tokens)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    return int(not (keep("experts", figures) and is_same))


if __name__ == "__main__":
    raise SystemExit(main())
