"""AWQ by AutoAWQ, in AutoAWQ's environment: scales are searched on text and folded.

Each layer's scales go from q, k, v into `input_layernorm`, from gate and up into
`post_attention_layernorm`, from down into the rows of up; with grouped-query attention none go
from o into v.
"""

from __future__ import annotations

from typing import Any

import torch
from awq import AutoAWQForCausalLM  # type: ignore[import-not-found]
from awq.quantize.quantizer import AwqQuantizer  # type: ignore[import-not-found]
from transformers import AutoTokenizer

from benchmarks.third_party.calibration import calibration_windows, parse_arguments


class Quantizer(AwqQuantizer):
    """AutoAWQ's own, with two things put right.

    Its search for scales restores weights from `tensor.cpu()`, which is no copy on a CPU: weights
    come out scaled twice. And channels that are zero, as all padding of the widened model is, get
    extreme scales, which the others are then normalized by: they get the mean one instead.
    """

    def _compute_best_scale(
        self,
        x: torch.Tensor,
        w_mean: torch.Tensor,
        x_mean: torch.Tensor,
        module2inspect: torch.nn.Module,
        *rest: Any,
    ) -> Any:
        padding = (x_mean == 0) | (w_mean == 0)
        x_mean = torch.where(padding, x_mean[~padding].mean(), x_mean)
        w_mean = torch.where(padding, w_mean[~padding].mean(), w_mean)
        state_dict = module2inspect.state_dict
        module2inspect.state_dict = lambda: {  # type: ignore[method-assign, assignment]
            name: tensor.clone() for name, tensor in state_dict().items()
        }
        try:
            return super()._compute_best_scale(x, w_mean, x_mean, module2inspect, *rest)
        finally:
            del module2inspect.state_dict


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
        quantizer_cls=Quantizer,
    )
    # what is not quantized is served in half precision, and config.json must say so
    model.model.half()
    model.model.config.torch_dtype = torch.float16
    model.save_quantized(str(options.out))
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
