"""Experts in the formats of the checkpoints under tests/data/peers, with random numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tests.checkpoint.peers import quantization_config
from tests.checkpoints import write_checkpoint
from tests.dryrun.auto import alike
from tests.quantize.peers import LAYERS, torch_layer

MODULE = "model.layers.0.mlp.experts"
NUM_EXPERTS, HIDDEN, INNER = 4, 256, 512
PROJECTIONS = {
    "gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)
}  # fmt: skip


def expert_tensors(
    peer_of: Callable[[int, int], str], num_layers: int = 1
) -> dict[str, torch.Tensor]:
    """Tensors of experts.

    Args:
        peer_of: number of a layer, and of an expert in it -> the peer whose format it has.
    """
    return {
        f"model.layers.{layer}.mlp.experts.{expert}.{projection}.{suffix}": alike(
            suffix, like, N, K
        )
        for layer in range(num_layers)
        for expert in range(NUM_EXPERTS)
        for projection, (N, K) in PROJECTIONS.items()
        for suffix, like in torch_layer(peer_of(layer, expert), LAYERS[0]).items()
    }


def write_experts(
    folder: Path,
    peer: str,
    peer_of: Callable[[int, int], str] | None = None,
    num_layers: int = 1,
    **changes: Any,
) -> Path:
    """Write a checkpoint of experts alone, with a peer's `quantization_config`.

    Args:
        peer: whose; and the format of all experts but those that `peer_of` gives another.
        changes: keys of it to overwrite.
    """
    torch.manual_seed(0)
    tensors = expert_tensors(peer_of or (lambda _layer, _expert: peer), num_layers)
    config: dict[str, Any] = {"architectures": ["SliceOfAModel"], "torch_dtype": "bfloat16"}
    said: Mapping[str, Any] = {**quantization_config(peer), **changes}
    if said:
        config["quantization_config"] = dict(said)
    return write_checkpoint(folder, config, tensors)
