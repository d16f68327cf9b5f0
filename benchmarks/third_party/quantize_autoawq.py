"""AWQ by AutoAWQ, in AutoAWQ's environment: scales are searched on text and folded into norms."""

from __future__ import annotations

import torch
from awq import AutoAWQForCausalLM  # type: ignore[import-not-found]
from transformers import AutoTokenizer

from benchmarks.third_party.calibration import parse_arguments, windows_of


def _cloned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone()


def main() -> None:
    """Quantize a checkpoint and write it with its tokenizer."""
    options = parse_arguments()
    # AutoAWQ keeps the weights that it restores by `.cpu()`, which on a CPU copies nothing: they
    # would stay scaled (awq/quantize/quantizer.py:393, 0.2.9)
    torch.Tensor.cpu = _cloned  # type: ignore[assignment]
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    windows = windows_of(tokenizer, options.arguments)
    model = AutoAWQForCausalLM.from_pretrained(
        str(options.model), device_map="cpu", torch_dtype=torch.float32, use_cache=False
    )
    model.quantize(
        tokenizer,
        quant_config={
            "zero_point": True, "q_group_size": options.arguments["group_size"], "w_bit": 4,
            "version": "GEMM",
        },
        calib_data=windows,
        max_calib_seq_len=512,
    )  # fmt: skip
    model.save_quantized(str(options.out))
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
