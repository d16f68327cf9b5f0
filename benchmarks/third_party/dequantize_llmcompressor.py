"""Plain weights of a compressed-tensors checkpoint, by that library's own compressors."""

from __future__ import annotations

import json

import torch
from compressed_tensors.compressors import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
    BaseCompressor,
)
from compressed_tensors.quantization import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
    QuantizationConfig,
)

from benchmarks.third_party.calibration import parse_arguments
from benchmarks.third_party.dense import Tensors, read_layers, write_dense


def main() -> None:
    """Dequantize a checkpoint; scales are made float32 first, so that products are not rounded."""
    options = parse_arguments()
    config = json.loads((options.model / "config.json").read_text(encoding="utf-8"))
    quantization = QuantizationConfig.model_validate(config["quantization_config"])
    (scheme,) = quantization.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(scheme.format or quantization.format)
    dense: Tensors = {}
    for layer, tensors in read_layers(options.model).items():
        if "weight_scale" in tensors:
            tensors["weight_scale"] = tensors["weight_scale"].to(torch.float32)
            tensors = {"weight": compressor.decompress(tensors, scheme)["weight"]}
        dense |= {f"{layer}.{suffix}": tensor for suffix, tensor in tensors.items()}
    write_dense(dense, options.out)


if __name__ == "__main__":
    main()
