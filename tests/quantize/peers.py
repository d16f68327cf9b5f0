"""Layers of the checkpoints under tests/data/peers, as torch and as numpy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from tests.reference.safetensors_file import read_safetensors

PEERS = Path(__file__).parent.parent / "data" / "peers"
FILE = "layer0.safetensors"
LAYERS = ("model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj")
EXPECTED: dict[str, dict[str, dict[str, float]]] = json.loads((PEERS / "expected.json").read_text())


def torch_layer(folder: str, layer: str) -> dict[str, torch.Tensor]:
    """Tensors of a layer by suffix, through the safetensors package."""
    return _layer(load_file(PEERS / folder / FILE), layer)


def numpy_layer(folder: str, layer: str) -> dict[str, np.ndarray]:
    """Tensors of a layer by suffix, through the tests' own reader."""
    return _layer(read_safetensors(PEERS / folder / FILE), layer)


def config(folder: str) -> dict[str, Any]:
    """The `quantization_config` that the tool wrote."""
    loaded: dict[str, Any] = json.loads((PEERS / folder / "quantization_config.json").read_text())
    return loaded


def original(layer: str) -> torch.Tensor:
    """The bf16 weight that every tool started from."""
    return torch_layer("bf16", layer)["weight"]


def is_expected(weight: np.ndarray, folder: str, layer: str) -> bool:
    """Whether a dequantized weight is the one of `expected.json`, to its printed digits."""
    expected = EXPECTED[folder][f"{layer}.weight"]
    base = original(layer).float().numpy().astype(np.float64)
    weight = weight.astype(np.float64)
    distance = np.linalg.norm(weight - base) / np.linalg.norm(base)
    return (
        abs(distance - expected["relative_rms_to_bf16"]) < 1e-5
        and abs(np.abs(weight).mean() - expected["mean_abs"]) < 1e-8
        and abs(weight.sum() - expected["sum"]) < 1e-4
    )


def relative_rms(weight: torch.Tensor, base: torch.Tensor) -> float:
    """Relative RMS distance of a weight to its original."""
    return float((weight.float() - base.float()).norm() / base.float().norm())


def _layer(tensors: dict[str, Any], layer: str) -> dict[str, Any]:
    return {
        name.removeprefix(f"{layer}."): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{layer}.")
    }
