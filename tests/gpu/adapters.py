"""A small random LoRA adapter, for SGLang and for the reference."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

RANK = 16
ALPHA = 32
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# of a layer's output, root mean square, for an input that is white
_SHARE = 0.1
_SEED = 7


def write_adapter(model: Path, folder: Path) -> Path:
    """Write an adapter of every projection of a Llama checkpoint, in PEFT's layout.

    Source: PEFT's names, base_model.model.<layer>.lora_A.weight [R, K] and lora_B.weight [N, R].
    """
    generator = torch.Generator().manual_seed(_SEED)
    tensors = {}
    for name, weight in sorted(load_file(model / "model.safetensors").items()):
        layer = name.removesuffix(".weight")
        if layer.rpartition(".")[2] not in PROJECTIONS:
            continue
        N, K = weight.shape
        a = torch.randn(RANK, K, generator=generator) / math.sqrt(K)
        b = torch.randn(N, RANK, generator=generator)
        # rms of W x is that of W times sqrt(K), of B A x that of B times sqrt(R), for white x
        size = weight.float().square().mean().sqrt() * math.sqrt(K / RANK)
        b *= _SHARE * size * RANK / ALPHA
        prefix = f"base_model.model.{layer}"
        tensors[f"{prefix}.lora_A.weight"] = a.to(torch.bfloat16)
        tensors[f"{prefix}.lora_B.weight"] = b.to(torch.bfloat16)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    said = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA,
        "lora_dropout": 0.0, "bias": "none", "target_modules": list(PROJECTIONS),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(said, indent=1), encoding="utf-8")
    return folder


class AdaptedLinear(torch.nn.Module):
    """A layer of the reference and the adapter's part of its output, rounded once.

    Args:
        base: [..., K] to [..., N].
        a: [R, K].
        b: [N, R].
    """

    def __init__(self, base: torch.nn.Module, a: torch.Tensor, b: torch.Tensor) -> None:
        super().__init__()
        self.base, self.a, self.b = base, a.float(), b.float() * (ALPHA / RANK)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] to [..., N]."""
        out: torch.Tensor = self.base(x)
        return (out.float() + x.float() @ self.a.T @ self.b.T).to(out.dtype)


def adapt(model: Any, folder: Path) -> None:
    """Put an adapter on a transformers model, in place."""
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, a in tensors.items():
        layer, _, which = name.removeprefix("base_model.model.").rpartition(".lora_")
        if which != "A.weight":
            continue
        parent, _, attribute = layer.rpartition(".")
        b = tensors[name.replace(".lora_A.", ".lora_B.")]
        adapted = AdaptedLinear(model.get_submodule(layer), a, b)
        setattr(model.get_submodule(parent), attribute, adapted)
