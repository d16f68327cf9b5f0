"""GPTQ by gptqmodel, in gptqmodel's environment; nothing is folded."""

from __future__ import annotations

from gptqmodel import BACKEND, GPTQModel, QuantizeConfig  # type: ignore[import-not-found]

from benchmarks.third_party.calibration import parse_arguments, windows_of


def main() -> None:
    """Quantize a checkpoint and write it with its tokenizer."""
    options = parse_arguments()
    arguments = options.arguments
    config = QuantizeConfig(
        bits=4,
        group_size=arguments["group_size"],
        desc_act=arguments["desc_act"],
        sym=True,
        device="cpu",
    )
    model = GPTQModel.load(str(options.model), config)
    windows = windows_of(model.tokenizer, arguments)
    calibration = [{"input_ids": window, "attention_mask": [1] * len(window)} for window in windows]
    model.quantize(calibration, batch_size=4, backend=BACKEND.TORCH)
    model.save(str(options.out))


if __name__ == "__main__":
    main()
