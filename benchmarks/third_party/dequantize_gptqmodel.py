"""Plain weights of a GPTQ checkpoint, by gptqmodel's own `dequantize_model`."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from gptqmodel.utils.model_dequant import (  # type: ignore[import-not-found]
    dequantize_model,
)

from benchmarks.third_party.calibration import parse_arguments
from benchmarks.third_party.dense import read_layers, write_dense


def main() -> None:
    """Dequantize a checkpoint."""
    options = parse_arguments()
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        dequantized = Path(folder) / "dequantized"
        dequantize_model(options.model, dequantized, target_dtype=torch.float32)
        dense = {
            f"{layer}.{suffix}": tensor
            for layer, tensors in read_layers(dequantized).items()
            for suffix, tensor in tensors.items()
        }
        write_dense(dense, options.out)


if __name__ == "__main__":
    main()
