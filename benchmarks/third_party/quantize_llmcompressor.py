"""A compressed-tensors scheme by llm-compressor, in its environment.

FP8_BLOCK, FP8_DYNAMIC and W8A8 need no calibration: weights are rounded to nearest, activations are
quantized as they come. With `smoothing`, SmoothQuant runs first on text: q, k, v fold into
`input_layernorm`, gate and up into `post_attention_layernorm`.
"""

from __future__ import annotations

from typing import Any

import torch
from llmcompressor import oneshot  # type: ignore[import-not-found]
from llmcompressor.modifiers.quantization import (  # type: ignore[import-not-found]
    QuantizationModifier,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.third_party.calibration import parse_arguments


def main() -> None:
    """Quantize a checkpoint and write it with its tokenizer."""
    options = parse_arguments()
    model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
    scheme = options.arguments["scheme"]
    recipe = QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"])
    oneshot(model=model, recipe=recipe, pipeline="datafree")
    model.save_pretrained(options.out, save_compressed=True)
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
