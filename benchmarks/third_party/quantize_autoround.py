"""AWQ's layout by auto-round, in auto-round's environment.

With `fold`, auto-round's own AWQ searches scales on text and folds them, as AutoAWQ does; without,
weights are rounded to nearest and nothing is folded.
"""

from __future__ import annotations

from pathlib import Path

from auto_round import (  # type: ignore[import-not-found]
    AutoRound,
    AWQConfig,
    RTNConfig,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.third_party.calibration import parse_arguments, windows_of


def main() -> None:
    """Quantize a checkpoint and write it with its tokenizer."""
    options = parse_arguments()
    arguments = options.arguments
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    windows = windows_of(tokenizer, arguments)
    algorithms = [AWQConfig(), RTNConfig()] if arguments["fold"] else [RTNConfig()]
    rounding = AutoRound(
        AutoModelForCausalLM.from_pretrained(options.model, dtype="auto"),
        tokenizer,
        scheme="W4A16",
        sym=False,
        group_size=arguments["group_size"],
        dataset=[tokenizer.decode(window) for window in windows],
        # a window's text may have fewer tokens than the window, and shorter samples are left out
        seqlen=len(windows[0]) // 2,
        nsamples=len(windows),
        batch_size=4,
        device_map="cpu",
        enable_torch_compile=False,
        alg_configs=algorithms,
    )
    _, folder = rounding.quantize_and_save(str(options.out), format="auto_awq")
    # it writes to a subfolder that it names after model and scheme
    for path in Path(folder).iterdir():
        path.rename(options.out / path.name)
    Path(folder).rmdir()


if __name__ == "__main__":
    main()
