"""Compare what the engine computes for every shipped preset with an independent reference.

    python -m benchmarks.quality [--preset NAME ...] [--out docs/quality.md]

For each preset a server is started, and its log-probabilities of the prose in benchmarks/data, over
the whole vocabulary, are compared with those of a transformers model that holds the same weights,
dequantized by code of its own (tests/reference). Where a method quantizes activations, the
reference does so too (benchmarks/activations.py). One run each, nothing averaged.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from benchmarks.figures import Figure, keep
from benchmarks.presets import PRESETS, fitting_presets
from benchmarks.reference_model import (
    load_reference,
    load_unquantized,
    log_probabilities,
    windowed_log_probabilities,
)
from benchmarks.rounding import round_as_kernels
from demo.model import cache_dir, checkpoint
from mixedprec_plugin.cli.main import main as mixedprec
from mixedprec_plugin.evaluate.engine import WINDOW, distributions
from mixedprec_plugin.evaluate.server import Server
from mixedprec_plugin.methods.interface import Target
from tests.presets import open_virtual_checkpoint

ROOT = Path(__file__).resolve().parents[1]
PROSE = ROOT / "benchmarks" / "data" / "prose.txt"
UNQUANTIZED = "(bf16, no preset)"
# what stands behind the name of a preset that is rounded by `convert --calibrate`
CALIBRATED = ", calibrated"
BOTH_WAYS = ("awq", "gptq")
WEIGHT_ONLY_LIMIT = 0.002
QUANTIZED_INPUT_LIMIT = 0.01
PERPLEXITY_TOLERANCE = 0.01
QUANTIZES_INPUT = ("fp8", "fp8_channel", "blockwise_int8", "int8_channel")


@dataclasses.dataclass(frozen=True)
class Result:
    """One preset's comparison.

    Attributes:
        bits_per_weight: over all weight matrices, scales counted.
        engine, reference, unquantized: perplexities; the last of the bf16 weights in fp32.
        divergence: mean KL(reference || engine) a token, in nats; the reference rounds to bf16
            where SGLang's kernels do.
        to_float32: the same from the reference with nothing rounded but what the method rounds.
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
    to_float32: float
    to_unquantized: float
    limit: float
    num_tokens: int

    @property
    def is_within(self) -> bool:
        """Whether the divergence and the perplexities' ratio keep to their limits."""
        ratio = self.engine / self.reference
        return self.divergence < self.limit and abs(ratio - 1) < PERPLEXITY_TOLERANCE


def main(arguments: list[str] | None = None) -> int:
    """Measure, and write the table; return 1 if a preset is outside its limits."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality")
    parser.add_argument("--preset", action="append", help="name of a shipped preset; repeatable")
    parser.add_argument(
        "--out", type=Path, help="write the table here, and its numbers beside it as .json"
    )
    options = parser.parse_args(arguments)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model_path = checkpoint("widened")
    presets = fitting_presets(model_path)
    names = options.preset or [UNQUANTIZED, *presets, *map(f"{{}}{CALIBRATED}".format, BOTH_WAYS)]
    known = _read(options.out) if options.preset else {}
    tokens = AutoTokenizer.from_pretrained(model_path)(PROSE.read_text(encoding="utf-8"))[
        "input_ids"
    ]
    unquantized = log_probabilities(load_unquantized(model_path), tokens)
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        known[name] = measure(name, model_path, tokens, unquantized)
        _write(options.out, known)
    is_near = keep("quality", figures_of(known))
    return int(not (is_near and all(known[name].is_within for name in names)))


def figures_of(results: Mapping[str, Result]) -> list[Figure]:
    """Each KL from its reference beside the stock server's, and what the preset itself costs."""
    stock = results.get(UNQUANTIZED)
    figures = []
    for name, x in results.items():
        if name != UNQUANTIZED:
            peer = stock.divergence if stock else None
            figures.append(Figure(f"{name}, KL from its reference", x.divergence, peer, x.limit))
            figures.append(Figure(f"{name}, KL from bf16", x.to_unquantized))
    return figures


def measure(name: str, model_path: Path, tokens: list[int], unquantized: torch.Tensor) -> Result:
    """Compare one preset's server with its reference.

    Args:
        name: a shipped preset, with CALIBRATED or without, or UNQUANTIZED for a stock server.
        tokens: T token ids.
        unquantized: [T - 1, V] log-probabilities of the bf16 weights in fp32.
    """
    preset_path, bits, limit = None, 16.0, WEIGHT_ONLY_LIMIT
    if name != UNQUANTIZED:
        preset_path = PRESETS / f"{name.removesuffix(CALIBRATED)}.yaml"
        if name.endswith(CALIBRATED):
            preset_path = _calibrated(model_path, preset_path)
        plan = open_virtual_checkpoint(model_path, preset_path, Target(device="cpu")).plan
        layers = [layer for layer in plan.layers if layer.num_weights]
        bits = 8 * sum(x.bytes_after for x in layers) / sum(x.num_weights for x in layers)
        if any(layer.method in QUANTIZES_INPUT for layer in layers):
            limit = QUANTIZED_INPUT_LIMIT
    reference = _run_reference(model_path, preset_path, tokens, torch.bfloat16)
    in_float32 = unquantized
    if preset_path is not None:
        in_float32 = _run_reference(model_path, preset_path, tokens, torch.float32)
    sums = np.zeros(4)
    with (
        tempfile.TemporaryDirectory(prefix="mixedprec-quality-") as folder,
        Server(model_path, Path(folder) / "server.log", preset_path) as server,
    ):
        for first, rows in distributions(server, tokens, reference.shape[1]):
            sums += _sums(first, rows, tokens, (reference, in_float32, unquantized))
    count = len(tokens) - 1
    loss, divergence, to_float32, to_unquantized = (float(value) / count for value in sums)
    return Result(
        preset=name,
        bits_per_weight=bits,
        engine=math.exp(loss),
        reference=math.exp(_loss(reference, tokens)),
        unquantized=math.exp(_loss(unquantized, tokens)),
        divergence=divergence,
        to_float32=to_float32,
        to_unquantized=to_unquantized,
        limit=limit,
        num_tokens=count,
    )


def _calibrated(model_path: Path, preset_path: Path) -> Path:
    """A preset of what a preset is calibrated to; converted once, below the cache."""
    folder = cache_dir() / "quality" / f"{model_path.name}-{preset_path.stem}"
    if not folder.exists():
        words = ["--model", model_path, "--preset", preset_path, "--out", folder, "--calibrate"]
        code = mixedprec(["convert", "--device", "cpu", *map(str, words)])
        if code:
            raise SystemExit(code)
    found = folder.with_suffix(".yaml")
    rules = [{"match": "*_proj", "method": "auto", "source": "made"}]
    content = {"version": 1, "sources": {"made": {"path": str(folder)}}, "rules": rules}
    found.write_text(json.dumps(content), encoding="utf-8")
    return found


def _run_reference(
    model_path: Path, preset_path: Path | None, tokens: list[int], dtype: torch.dtype
) -> torch.Tensor:
    """[T - 1, V] log-probabilities of the reference; in bf16 it rounds as SGLang's kernels do."""
    if preset_path is None:
        model = load_unquantized(model_path, dtype)
    else:
        model, _ = load_reference(model_path, preset_path, dtype)
    if dtype == torch.float32:
        return log_probabilities(model, tokens)
    round_as_kernels(model)
    return windowed_log_probabilities(model, tokens, WINDOW)


def _sums(
    first: int, rows: np.ndarray, tokens: list[int], references: tuple[torch.Tensor, ...]
) -> np.ndarray:
    """Sum over a window: negative log-likelihood, and the KL from every reference."""
    positions = slice(first - 1, first - 1 + len(rows))
    engine = torch.from_numpy(rows)
    targets = torch.tensor(tokens[first : first + len(rows)])
    loss = -engine.gather(1, targets[:, None]).double().sum()
    return np.array([float(loss), *(_divergence(x[positions], engine) for x in references)])


def _divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    """Sum over rows of KL(p || q) in nats, from log-probabilities [n, V]."""
    return float((p.exp() * (p - q)).double().sum())


def _loss(log_probs: torch.Tensor, tokens: list[int]) -> float:
    """Mean negative log-likelihood of the tokens after the first."""
    return -float(log_probs.gather(1, torch.tensor(tokens[1:])[:, None]).double().mean())


def table(results: list[Result]) -> str:
    """Return the results as a markdown table."""
    lines = [
        "| preset | bits a weight of all | PPL engine | PPL reference | ratio | mean KL | limit "
        "| KL to fp32 | PPL bf16 | KL to bf16 |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for x in results:
        mark = "" if x.is_within else " **over**"
        lines.append(
            f"| {x.preset} | {x.bits_per_weight:.2f} | {x.engine:.3f} | {x.reference:.3f} "
            f"| {x.engine / x.reference:.4f} | {x.divergence:.5f}{mark} | {x.limit} "
            f"| {x.to_float32:.5f} | {x.unquantized:.3f} | {x.to_unquantized:.4f} |"
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
        weight_only=WEIGHT_ONLY_LIMIT, quantized=QUANTIZED_INPUT_LIMIT,
    ), encoding="utf-8")  # fmt: skip


_PAGE = """# Quality

Written by `make quality`; the numbers are also in quality.json.

For every shipped preset for dense models a server runs the widened SmolLM2-135M-Instruct on the
CPU platform (SGLang {sglang}, torch {torch}), and gives its log-probabilities over the whole
vocabulary of 49,152 tokens, nothing cut off, for {tokens} tokens of English prose
(benchmarks/data/prose.txt), each given all tokens before it.

- *reference*: one run of a transformers {transformers} model in bf16, the engine's dtype. Quantized
  layers hold the same weights, read by independent numpy and torch code
  (tests/reference/dequantize.py, benchmarks/activations.py), and quantize activations where the
  method does so, by the formulas of SGLang's CUDA kernels: products of codes, scaled and summed in
  fp32. Weights of weight-only methods are dequantized to fp32 and not rounded. The residual and the
  norms are rounded where SGLang's fused_add_rmsnorm rounds them (benchmarks/rounding.py).
  Attention (torch's sdpa), rotary embedding, silu and lm_head are in bf16, as in SGLang's
  torch-native forward, the logits too, as in a server without --enable-fp32-lm-head. The prose is
  read in the windows in which the server is asked, because shapes decide the order of sums.
- *mean KL*: KL(reference || engine) a token, in nats, nothing averaged over runs. It must stay
  below {weight_only} for weight-only presets and {quantized} where activations are quantized, and
  the perplexities must agree within 1%. The first row is a stock bf16 server.
- *KL to fp32*: from one run of the same model in fp32, transformers' norms unchanged: nothing is
  rounded but what the method rounds. It is no criterion, and may be over the limit (fp8-block was
  when this was the criterion, and the bf16 reference came after). With quantized input the model
  is chaotic (a rounding that turns over makes others do so), and two correct implementations
  that round at different points, or sum in another order, end up about this far from each other.
- *PPL bf16*, *KL to bf16*: the unquantized weights in fp32, and how far the preset is from them:
  what the preset costs on this very small model; *calibrated* is what `convert --calibrate` makes
  of it, on text that the model writes.
- Processors with units for bf16 products (AMX) sum them otherwise than those without, the stock
  server's too: from one to the other *KL to bf16* moved by at most 0.0008, and of what is
  calibrated, where the model writes another text, by 0.006.
- Experts, in MXFP4 and NVFP4 too, are measured in [experts.md](experts.md).

{table}"""


if __name__ == "__main__":
    raise SystemExit(main())
