"""A transformers model of a composed plan, from weights that the tools' own code dequantized."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.activations import QuantizedInputLinear, WeightOnlyLinear, fp8_group
from benchmarks.reference_model import load_unquantized
from benchmarks.rounding import round_as_kernels
from mixedprec_plugin.plan.model import Plan, PlannedLayer

Dense = Mapping[str, torch.Tensor]
# what stands before a projection; the norm of the projection's own source is folded into it
_NORMS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "input_layernorm"),
    **dict.fromkeys(("gate_proj", "up_proj"), "post_attention_layernorm"),
}
_GROUP = 128


def composed_model(plan: Plan, original: Path, folders: Mapping[str, Path]) -> Any:
    """Put every planned layer's plain weight into the original model.

    Args:
        plan: which layer comes from which source.
        original: the bf16 checkpoint, source `model`.
        folders: other source -> folder of its plain float32 weights.
    Returns:
        a model that computes in bf16 and rounds as SGLang's kernels do.
    """
    dense = {name: load_file(folder / "model.safetensors") for name, folder in folders.items()}
    dense["model"] = load_file(original / "model.safetensors")
    model = load_unquantized(original, torch.bfloat16)
    for layer in plan.layers:
        weight = dense[layer.source][f"{layer.name}.weight"].float()
        if not layer.num_weights or layer.scheme is None:
            model.get_parameter(f"{layer.name}.weight").data.copy_(weight)
            continue
        weight = _behind_served_norm(weight, layer, plan, dense)
        parent, _, attribute = layer.name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, _linear(weight, layer.method))
    round_as_kernels(model)
    return model


def _behind_served_norm(
    weight: torch.Tensor, layer: PlannedLayer, plan: Plan, dense: Mapping[str, Dense]
) -> torch.Tensor:
    """What the weight must be where the norm before it is another source's."""
    block, _, rest = layer.name.partition(".self_attn." if ".self_attn." in layer.name else ".mlp.")
    if rest not in _NORMS:
        return weight
    norm = f"{block}.{_NORMS[rest]}"
    source = plan.by_name[norm].source
    if source == layer.source:
        return weight
    served = dense[source][f"{norm}.weight"].to(torch.bfloat16).float()
    return weight * dense[layer.source][f"{norm}.weight"].float() / served


def _linear(weight: torch.Tensor, method: str) -> QuantizedInputLinear | WeightOnlyLinear:
    if method == "fp8":
        ones = torch.ones(len(weight), -(-weight.shape[1] // _GROUP))
        return QuantizedInputLinear(weight, ones, None, fp8_group)
    if method == "bf16":
        weight = weight.to(torch.bfloat16).float()
    return WeightOnlyLinear(weight, None)
