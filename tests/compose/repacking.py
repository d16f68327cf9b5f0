"""Checkpoints whose projections follow one rule, and their layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mixedprec_plugin.compose.stream import VirtualCheckpoint
from mixedprec_plugin.methods.interface import Target
from tests.presets import plan

LAYER = "model.layers.0.mlp.down_proj"


def stream(
    model: Path, rule: str, dtype: str = "BF16", action: str = "repack"
) -> dict[str, torch.Tensor]:
    """The tensors of a model whose projections follow one rule."""
    made = plan(model, f'match: "*_proj", {rule}', target=Target(device="cpu", dtype=dtype))
    assert not made.errors, made.errors
    planned = {layer.action for layer in made.layers if layer.name.endswith("_proj")}
    assert planned == {action}
    return dict(iter(VirtualCheckpoint(made)))


def layer_of(tensors: dict[str, torch.Tensor], layer: str) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix(f"{layer}."): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{layer}.")
    }


def compressed(
    format_: str, weights: dict[str, Any], inputs: dict[str, Any] | None
) -> dict[str, Any]:
    """config.json of a compressed-tensors checkpoint."""
    group = {
        "targets": ["Linear"], "weights": weights, "input_activations": inputs, "format": format_
    }  # fmt: skip
    quantization = {
        "quant_method": "compressed-tensors", "format": format_, "config_groups": {"group_0": group}
    }  # fmt: skip
    return {"torch_dtype": "bfloat16", "quantization_config": quantization}
