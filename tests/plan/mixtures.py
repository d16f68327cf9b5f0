"""Plans over several sources, and slices of checkpoints whose scales a tool folded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.plan.model import Plan
from mixedprec_plugin.plan.resolve import resolve_plan
from mixedprec_plugin.plan.sources import open_other_sources
from tests.checkpoint.peers import quantization_config
from tests.presets import preset
from tests.quantize.peers import FILE, PEERS

FOLDED = Path(__file__).parent.parent / "data" / "folded"
CPU = Target(device="cpu")
ATTENTION = "model.layers.0.self_attn."
MLP = "model.layers.0.mlp."
INPUT_NORM = "model.layers.0.input_layernorm"
MLP_NORM = "model.layers.0.post_attention_layernorm"


def slice_tensors(folder: str) -> dict[str, torch.Tensor]:
    """Tensors of k_proj, v_proj, an MLP of 128 channels, and the norms before them."""
    return load_file(PEERS / folder / FILE) | load_file(FOLDED / folder / FILE)


def slice_checkpoint(
    path: Path, folder: str, changes: Mapping[str, Any] | None = None, **config: Any
) -> Path:
    """Write the slices of `autoawq-g64` or `bf16` as a checkpoint.

    Args:
        path: the folder to make.
        folder: which of the two.
        changes: tensors to add or overwrite; None removes one.
        config: keys of config.json to add or overwrite.
    """
    tensors = {**slice_tensors(folder), **(changes or {})}
    path.mkdir(parents=True)
    save_file({n: t for n, t in tensors.items() if t is not None}, path / "model.safetensors")
    whole: dict[str, Any] = {
        "architectures": ["SliceOfALlama"],
        "model_type": "llama",
        "hidden_size": 576,
        "torch_dtype": "bfloat16",
    }
    if quantization := quantization_config(folder):
        whole["quantization_config"] = quantization
    (path / "config.json").write_text(json.dumps({**whole, **config}))
    return path


def mixed_plan(
    model: Path, *lines: str, head: str = "", target: Target = CPU, **sources: Path
) -> Plan:
    """Plan the given rules over a checkpoint and further sources."""
    entries = "".join(f"  {name}: {{path: {path}}}\n" for name, path in sources.items())
    loaded = preset(model.parent / "presets", *lines, head=f"{head}sources:\n{entries}")
    return resolve_plan(loaded, open_source(model), target, open_other_sources(loaded))
