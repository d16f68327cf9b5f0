"""A compressed-tensors scheme by llm-compressor, in its environment.

FP8_BLOCK, FP8_DYNAMIC and W8A8 need no calibration: weights are rounded to nearest, activations are
quantized as they come. Without a `scheme` its GPTQ rounds to 4 bits.
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot  # type: ignore[import-not-found]
from llmcompressor.modifiers.quantization import (  # type: ignore[import-not-found]
    GPTQModifier,
    QuantizationModifier,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.third_party.calibration import parse_arguments, windows_of


def main() -> None:
    """Quantize a checkpoint and write it with its tokenizer."""
    options = parse_arguments()
    model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
    if "scheme" in options.arguments:
        scheme = options.arguments["scheme"]
        recipe = QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"])
        oneshot(model=model, recipe=recipe, pipeline="datafree")
    else:
        _run_gptq(model, tokenizer, options.arguments)
    model.save_pretrained(options.out, save_compressed=True)
    tokenizer.save_pretrained(options.out)


def _run_gptq(model: Any, tokenizer: Any, arguments: dict[str, Any]) -> None:
    """Quantize by its GPTQ, symmetric, all else as it does by itself."""
    weights = {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group",
        "group_size": arguments["group_size"],
    }  # fmt: skip
    recipe = GPTQModifier(
        config_groups={"group": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"]
    )
    windows = windows_of(tokenizer, arguments)
    rows = [{"input_ids": window, "attention_mask": [1] * len(window)} for window in windows]
    oneshot(
        model=model, recipe=recipe, dataset=Dataset.from_list(rows),
        max_seq_length=len(windows[0]), num_calibration_samples=len(windows),
    )  # fmt: skip


if __name__ == "__main__":
    main()
