"""Plain weights of an AWQ checkpoint, by AutoAWQ's own `dequantize_gemm`."""

from __future__ import annotations

from awq.utils.packing_utils import dequantize_gemm  # type: ignore[import-not-found]

from benchmarks.third_party.calibration import parse_arguments
from benchmarks.third_party.dense import Tensors, read_layers, write_dense


def main() -> None:
    """Dequantize a checkpoint."""
    options = parse_arguments()
    dense: Tensors = {}
    for layer, tensors in read_layers(options.model).items():
        if "qweight" in tensors:
            weight = dequantize_gemm(
                tensors.pop("qweight"),
                tensors.pop("qzeros"),
                tensors.pop("scales").float(),
                4,
                options.arguments["group_size"],
            )
            tensors["weight"] = weight.t()
        dense |= {f"{layer}.{suffix}": tensor for suffix, tensor in tensors.items()}
    write_dense(dense, options.out)


if __name__ == "__main__":
    main()
