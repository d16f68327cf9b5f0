"""AWQ by AutoAWQ, in AutoAWQ's environment: scales are searched on text and folded.

Each layer's scales go from q, k, v into `input_layernorm`, from gate and up into
`post_attention_layernorm`, from down into the rows of up; with grouped-query attention none go
from o into v.
"""

from __future__ import annotations

import torch
from awq import AutoAWQForCausalLM  # type: ignore[import-not-found]
from transformers import AutoTokenizer

from benchmarks.third_party.calibration import calibration_windows, parse_arguments


def main() -> None:
    """Quantize a checkpoint and write it with its tokenizer."""
    options = parse_arguments()
    group_size = options.arguments["group_size"]
    num_windows, num_tokens = options.arguments["windows"], options.arguments["tokens"]
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    # float16 is AutoAWQ's default; a CPU multiplies it ten times slower than float32
    model = AutoAWQForCausalLM.from_pretrained(
        str(options.model), torch_dtype=torch.float32, device_map="cpu"
    )
    model.quantize(
        tokenizer,
        quant_config={
            "zero_point": True,
            "q_group_size": group_size,
            "w_bit": 4,
            "version": "GEMM",
        },
        calib_data=calibration_windows(tokenizer, num_windows, num_tokens),
        max_calib_samples=num_windows,
        max_calib_seq_len=num_tokens,
        # the search for clipping takes two thirds of the time
        apply_clip=False,
    )
    # what is not quantized is served in half precision, and config.json must say so
    model.model.half()
    model.model.config.torch_dtype = torch.float16
    model.save_quantized(str(options.out))
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
