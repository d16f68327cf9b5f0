"""Serve a model composed of third-party checkpoints, and hold it against the tools' own weights.

    python -m benchmarks.third_party.serve [--tokens N] [--out FILE]

Two presets: composed.yaml, and the same without its FP8 layers, which quantize activations too.
"""

from __future__ import annotations

import argparse
import collections
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from benchmarks.experts import PROSE
from benchmarks.reference_model import divergence, load_unquantized, log_probabilities, perplexity
from benchmarks.third_party.composition import composed_model
from benchmarks.third_party.make import checkpoints_dir
from benchmarks.third_party.recipes import RECIPES
from benchmarks.third_party.reference import reference
from demo.model import checkpoint
from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.evaluate.engine import distributions
from mixedprec_plugin.evaluate.server import Server
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.plan.model import Plan
from mixedprec_plugin.plan.resolve import resolve_plan
from mixedprec_plugin.plan.sources import open_other_sources
from mixedprec_plugin.preset.load import load_preset

COMPOSED = Path(__file__).with_name("composed.yaml")
NAMES = {
    "gptq": "gptq-int4-g128",
    "awq": "autoround-awq-int4-g128",
    "fp8": "fp8-block",
    "w8a8": "w8a8-int8",
}
LIMITS = {"weight-only": 0.002, "with quantized activations": 0.01}


def presets(folder: Path) -> dict[str, Path]:
    """The composed preset, and the same with its FP8 layers dequantized."""
    weight_only = folder / "weight-only.yaml"
    text = COMPOSED.read_text(encoding="utf-8")
    weight_only.write_text(
        text.replace("fp8: {method: fp8_block, source: fp8}", "fp8: {method: bf16, source: fp8}"),
        encoding="utf-8",
    )
    return {"weight-only": weight_only, "with quantized activations": COMPOSED}


def plan_of(preset: Path, model: Path) -> Plan:
    """Plan a preset for the CPU platform."""
    loaded = load_preset(preset)
    return resolve_plan(
        loaded, open_source(model), Target(device="cpu"), open_other_sources(loaded)
    ).check()


def compare(title: str, preset: Path, tokens: list[int], folder: Path) -> tuple[str, bool]:
    """Serve one preset: a row of the table, and whether it is within its limit."""
    original = checkpoint("widened")
    plan = plan_of(preset, original)
    folders = {source: reference(RECIPES[name]) for source, name in NAMES.items()}
    expected = log_probabilities(composed_model(plan, original, folders), tokens)
    with Server(original, folder / "server.log", preset) as server:
        rows = [part for _, part in distributions(server, tokens, expected.shape[1])]
    served = torch.from_numpy(np.concatenate(rows))
    distance = divergence(expected, served)
    base = log_probabilities(load_unquantized(original), tokens)
    sources = collections.Counter(layer.source for layer in plan.layers if layer.num_weights)
    counts = ", ".join(f"{count} {source}" for source, count in sorted(sources.items()))
    row = (
        f"| {title} | {counts} | {distance:.5f} | {LIMITS[title]} | "
        f"{perplexity(served, tokens):.3f} | {perplexity(expected, tokens):.3f} | "
        f"{divergence(base, served):.4f} |"
    )
    return row, distance < LIMITS[title]


def main(arguments: list[str] | None = None) -> int:
    """Print the table; return 1 where a preset is over its limit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.third_party.serve")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--out", type=Path, help="write the table to this file as well")
    options = parser.parse_args(arguments)
    os.environ["THIRD_PARTY"] = str(checkpoints_dir())
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("widened"))
    tokens = tokenizer(PROSE.read_text(encoding="utf-8"))["input_ids"][: options.tokens]
    lines = [
        f"{len(tokens)} tokens of English prose, teacher-forced over the whole vocabulary.",
        "",
        "| preset | layers from | mean KL to the reference | limit | perplexity | of the reference "
        "| KL from bf16 |",
        "|---|---|---|---|---|---|---|",
    ]
    passed = True
    with tempfile.TemporaryDirectory() as name:
        for title, preset in presets(Path(name)).items():
            row, fits = compare(title, preset, tokens, Path(name))
            lines.append(row)
            passed = passed and fits
    text = "\n".join(lines)
    print(text)
    if options.out:
        heading = "# A model composed of third-party checkpoints\n\n`make third-party`. "
        options.out.write_text(heading + text + "\n", encoding="utf-8")
    if not passed:
        print("error: a preset is over its limit", file=sys.stderr)
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
