"""Tiny random checkpoints, made with transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from benchmarks.families.architectures import VOCAB_SIZE, Architecture

_SEED = 2026
PROMPT_LENGTH = 24
# so that the first expert of a token outweighs those that rounding lets change places
_ROUTER_SCALE = 3.0
_ROUTERS = ("mlp.gate.weight", "router.layer.weight", "router.weight", "mlp.gate.wg.weight")
# what published checkpoints of linear attention and Mamba hold in float32
_IN_FLOAT32 = (".A_log", ".dt_bias", ".D", ".linear_attn.norm.weight")


def make_checkpoint(architecture: Architecture, folder: Path) -> Path:
    """Write a checkpoint of an architecture in bf16, unless the folder holds it.

    Returns:
        the folder of the checkpoint.
    """
    path = folder / architecture.config_class
    if (path / "config.json").exists():
        return path
    config = getattr(transformers, architecture.config_class)(**architecture.settings)
    model_class: Any = getattr(transformers, architecture.model_class)
    torch.manual_seed(_SEED)
    is_auto = architecture.model_class.startswith("Auto")
    model = (model_class.from_config if is_auto else model_class)(config)
    _randomize_vectors(model)
    model.to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith(_IN_FLOAT32):
            parameter.data = parameter.data.float()
    model.save_pretrained(path)
    if architecture.packs_experts:
        _pack_experts(path / "model.safetensors")
    said = json.loads((path / "config.json").read_text(encoding="utf-8"))
    text = json.dumps(_merged(said, architecture.extra), indent=1)
    (path / "config.json").write_text(text, encoding="utf-8")
    return path


def _pack_experts(path: Path) -> None:
    """Have blocks and scales in the place of experts that are stored as floats [E, K, N].

    Their numbers are random anew: there is no other tool here that would round to them.
    """
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        count, K, N = tensors.pop(name).shape
        shape = (count, N, K // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
        # 2^-8 to 2^-6: about as large as the weights that they replace
        tensors[f"{name}_scales"] = torch.randint(119, 122, shape, dtype=torch.uint8)
    save_file(tensors, path, {"format": "pt"})


def _merged(said: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """What a config says with what is said beside; of sections, too, and None takes a key away."""
    made = {
        key: _merged(said.get(key, {}), value) if isinstance(value, Mapping) else value
        for key, value in extra.items()
    }
    return {key: value for key, value in {**said, **made}.items() if made.get(key, 0) is not None}


def prompt() -> list[int]:
    """The tokens of the prompt."""
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randint(3, VOCAB_SIZE, (PROMPT_LENGTH,), generator=generator).tolist()


def _randomize_vectors(model: Any) -> None:
    """Norms, biases and routers' corrections, all ones or zeros in a new model; and routers."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            if name.endswith(_ROUTERS):
                parameter.mul_(_ROUTER_SCALE)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(0.1 * torch.randn_like(buffer))
