"""Load an export as transformers and compressed-tensors do, and compare it with plain weights.

    python benchmarks/compressed_tensors/decompress.py EXPORT PLAIN

Prints JSON: versions, how many tensors were compared, and which differ.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig


def main(export: str, plain: str) -> None:
    """Compare every parameter with the plain checkpoint's tensor of its name."""
    # decompressed as it is loaded, by the library; in bfloat16 it would round FP8 scales first
    decompressed = CompressedTensorsConfig(run_compressed=False)
    model = AutoModelForCausalLM.from_pretrained(
        export, quantization_config=decompressed, dtype=torch.float32
    )
    held = dict(model.state_dict())
    expected = load_file(Path(plain) / "model.safetensors")
    differing = [
        name
        for name, tensor in expected.items()
        if name not in held or not torch.equal(held[name].to(torch.bfloat16), tensor)
    ]
    report = {
        "compressed-tensors": version("compressed-tensors"),
        "transformers": version("transformers"),
        "compared": len(expected),
        "differing": differing,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
