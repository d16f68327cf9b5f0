"""What the independent readers share: splitting tensors by layer, and writing plain weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]


def read_layers(folder: Path) -> dict[str, Tensors]:
    """Read a checkpoint folder: layer name -> parameter suffix -> tensor."""
    layers: dict[str, Tensors] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (it is no dict)
                layer, _, suffix = name.rpartition(".")
                layers.setdefault(layer, {})[suffix] = file.get_tensor(name)
    return layers


def write_dense(tensors: Mapping[str, torch.Tensor], out: Path) -> None:
    """Write tensors as float32 to model.safetensors.

    Raises:
        ValueError: a tensor that is not floating point is left: it was not dequantized.
    """
    left = [name for name, tensor in tensors.items() if not tensor.is_floating_point()]
    if left:
        raise ValueError(f"not dequantized: {', '.join(sorted(left)[:4])}")
    dense = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
    save_file(dense, out / "model.safetensors", metadata={"format": "pt"})
