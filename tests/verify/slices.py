"""Slices of a real model as whole checkpoints, as other tools wrote them and damaged."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.commands import run
from tests.presets import write_preset

DATA = Path(__file__).parent.parent / "data"
Change = Callable[[torch.Tensor], torch.Tensor]


def write_slices(
    folder: Path, kind: str, tool: str, changes: Mapping[str, Change] | None = None
) -> Path:
    """Write layer 0 of tests/data/KIND/TOOL as a checkpoint of a Llama.

    Args:
        changes: end of a tensor's name -> what is done to it.
    """
    folder.mkdir(parents=True)
    tensors = load_file(DATA / kind / tool / "layer0.safetensors")
    if kind == "folded":
        # by it a block's second norm is known to come before the MLP
        tensors["model.layers.0.input_layernorm.weight"] = torch.ones(576, dtype=torch.bfloat16)
    for end, change in (changes or {}).items():
        (name,) = [name for name in tensors if name.endswith(end)]
        changed = change(tensors[name]).contiguous()
        assert changed.shape == tensors[name].shape
        assert not torch.equal(changed.view(torch.uint8), tensors[name].view(torch.uint8))
        tensors[name] = changed
    save_file(tensors, folder / "model.safetensors")
    config: dict[str, Any] = {"model_type": "llama", "torch_dtype": "bfloat16"}
    config |= {"num_attention_heads": 9, "num_key_value_heads": 3}
    said = DATA / kind / tool / "quantization_config.json"
    if said.is_file():
        config["quantization_config"] = json.loads(said.read_text())
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def verify(model: Path, reference: Path, *more: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Run `mixedprec verify` on the dequantized layers.

    Returns:
        its exit code, and layer -> what it says of it.
    """
    preset = write_preset(model.parent / "presets", 'match: "*", method: bf16')
    flags = ("--model", model, "--preset", preset, "--device", "cpu", "--reference", reference)
    code, out, _ = run("verify", *flags, "--json", *more)
    return code, {entry["layer"]: entry for entry in json.loads(out)["layers"]}
