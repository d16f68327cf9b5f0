"""Hold our dequantizers against the tools' own, and tell what each checkpoint is.

    python -m benchmarks.third_party.compare [NAME ...]

For each checkpoint: the formats detected, the largest difference of any weight between our
`method: bf16` dequantizers and the independent plain weights, how far these and the norms are from
the original, before and after undoing what was folded, and perplexity and mean KL to the original.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from benchmarks.reference_model import divergence, load_unquantized, log_probabilities, perplexity
from benchmarks.third_party.calibration import calibration_windows
from benchmarks.third_party.folding import distance, folded_norms, unfold
from benchmarks.third_party.make import MADE, make, weights_bytes
from benchmarks.third_party.recipes import RECIPES
from benchmarks.third_party.reference import reference
from demo.model import checkpoint
from mixedprec_plugin.checkpoint.reader import Reader
from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.methods.recognition import recognize
from mixedprec_plugin.quantize.codec import load_codec

NUM_TOKENS = 512
_NUMBER = re.compile(r"\d+")
Tensors = Mapping[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Dequantized:
    """Our dequantizers beside the tool's.

    Attributes:
        formats: description -> number of layers.
        disagreements: what our detection says against config.json.
        difference: largest absolute one of any weight.
        relative: the same over the largest weight of its layer.
        missing: tensors that only one side has.
    """

    formats: Mapping[str, int]
    disagreements: Sequence[str]
    difference: float
    relative: float
    missing: Sequence[str]


def compare_dequantizers(folder: Path, dense: Tensors) -> Dequantized:
    """Dequantize every layer of a checkpoint and compare it with plain weights.

    Raises:
        ValueError: a layer's format cannot be dequantized.
    """
    source = open_source(folder)
    formats: collections.Counter[str] = collections.Counter()
    disagreements: set[str] = set()
    difference = relative = 0.0
    ours: set[str] = set()
    with Reader() as reader:
        for layer, headers in source.layers.items():
            tensors = {suffix: reader.read(header) for suffix, header in headers.items()}
            stored = recognize(headers, source.quantization_config, layer)
            if stored is not None:
                formats[stored.description] += 1
                disagreements.update(stored.disagreements)
                if stored.codec:
                    numbers = load_codec(stored.codec).read(tensors, stored.how)
                    tensors = {"weight": numbers.dequantize()}
                elif not tensors["weight"].is_floating_point():
                    raise ValueError(f"{layer}: {stored.description} cannot be dequantized")
            for suffix, tensor in tensors.items():
                name = f"{layer}.{suffix}"
                ours.add(name)
                if name in dense:
                    largest = float((tensor.float() - dense[name]).abs().max())
                    difference = max(difference, largest)
                    relative = max(relative, largest / float(dense[name].abs().max()))
    missing = sorted(ours ^ dense.keys())
    return Dequantized(dict(formats), sorted(disagreements), difference, relative, missing)


def distances(dense: Tensors, base: Tensors) -> dict[str, float]:
    """Mean relative distance from the original by layer name without its number."""
    groups: dict[str, list[float]] = {}
    for name, tensor in dense.items():
        if name in base:
            key = _NUMBER.sub("*", name).removeprefix("model.layers.*.")
            groups.setdefault(key, []).append(distance(tensor.float(), base[name].float()))
    return {key: sum(values) / len(values) for key, values in groups.items()}


def _tokens(model_path: Path) -> list[int]:
    from transformers import AutoTokenizer

    return calibration_windows(AutoTokenizer.from_pretrained(model_path), 1, NUM_TOKENS)[0]


def report(name: str, base: Tensors, unquantized: torch.Tensor, tokens: list[int]) -> str:
    """Describe one checkpoint, as markdown lines.

    Args:
        base: the original's weights.
        unquantized: [T - 1, V], log-probabilities of the original in fp32.
        tokens: T token ids.
    """
    recipe = RECIPES[name]
    folder, plain = make(recipe), reference(recipe)
    made = json.loads((folder / MADE).read_text(encoding="utf-8"))
    dense = load_file(plain / "model.safetensors")
    ours = compare_dequantizers(folder, dense)
    before, after = distances(dense, base), distances(unfold(dense, base), base)
    norms = [value for _, value in folded_norms(dense, base)]
    model: Any = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    result = log_probabilities(model.eval(), tokens)
    lines = [
        f"## {name}",
        f"{made['tool']} {made['version']}, {made['seconds']} s, "
        f"{weights_bytes(folder) / 2**20:.1f} MiB",
        f"formats: {ours.formats}; disagreements: {list(ours.disagreements)}",
        f"our dequantizers: largest difference {ours.difference:.3g}, "
        f"relative {ours.relative:.3g}; only on one side: {list(ours.missing)}",
        f"norms differ by {min(norms):.3g} to {max(norms):.3g}",
        *(
            f"  {key}: {value:.4f} from the original, unfolded {after[key]:.4f}"
            for key, value in before.items()
        ),
        f"PPL {perplexity(result, tokens):.3f} (original {perplexity(unquantized, tokens):.3f}), "
        f"mean KL {divergence(unquantized, result):.4f}",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Describe the checkpoints that are named, all by default; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.third_party.compare")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RECIPES)}")
    options = parser.parse_args(arguments)
    model_path = checkpoint("widened")
    base = load_file(model_path / "model.safetensors")
    tokens = _tokens(model_path)
    unquantized = log_probabilities(load_unquantized(model_path), tokens)
    for name in options.names or RECIPES:
        print(report(name, base, unquantized, tokens), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
