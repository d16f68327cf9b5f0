"""The checkpoints that are loaded: a real model, and random ones of a size that means something."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from demo.model import checkpoint
from mixedprec_plugin.cli.main import main

Tensors = dict[str, torch.Tensor]
_NUM_PARTS = 4


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, made to be loaded from one folder, and from two.

    Attributes:
        name: for the page.
        make: folder -> a checkpoint in several parts there.
        rules: the preset's, which take layers from the model and from the source `other`.
        is_large: whether its bytes take the time, and not what comes before them.
    """

    name: str
    make: Callable[[Path], None]
    rules: str
    is_large: bool = False


_DENSE_RULES = """\
  - {match: "model.layers.*.self_attn.*_proj", method: bf16}
  - {match: "model.layers.*.mlp.*_proj", method: bf16, source: other}
"""
_EXPERTS_RULES = """\
  - {match: "model.layers.*.self_attn.*_proj", method: bf16}
  - {match: "model.layers.*.mlp.experts.*", method: bf16, source: other}
"""


def write_sources(case: Case, folder: Path) -> tuple[Path, Path]:
    """Write a case's two checkpoints, of the same bytes, and its preset.

    Returns:
        the model's folder and the preset.
    """
    model, other, preset = folder / "model", folder / "other", folder / "preset.yaml"
    case.make(model)
    shutil.copytree(model, other)
    text = f"version: 1\nsources:\n  other: {{path: {other}}}\nrules:\n{case.rules}"
    preset.write_text(text, encoding="utf-8")
    return model, preset


def _real(folder: Path) -> None:
    """The demo's model, split into parts."""
    stored = checkpoint("widened")
    tensors = load_file(stored / "model.safetensors")
    names = sorted(tensors)
    size = -(-len(names) // _NUM_PARTS)
    chunks = (names[i : i + size] for i in range(0, len(names), size))
    config = json.loads((stored / "config.json").read_text(encoding="utf-8"))
    _write(folder, config, ({name: tensors[name] for name in chunk} for chunk in chunks))


_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32000,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_QWEN3_MOE: dict[str, Any] = {
    **_LLAMA, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
    "hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "vocab_size": 1024, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip


def _random(config: dict[str, Any]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        _write(folder, config, _random_parts(config))

    return make


def _random_parts(config: dict[str, Any]) -> Iterator[Tensors]:
    """A part for every few layers; the embeddings are in the first, the head in the last."""
    generator = torch.Generator().manual_seed(0)
    num_layers, size = config["num_hidden_layers"], -(-config["num_hidden_layers"] // _NUM_PARTS)
    ends = {"embed": "model.embed_tokens.weight", "head": "lm_head.weight"}
    matrix = (config["vocab_size"], config["hidden_size"])
    for start in range(0, num_layers, size):
        layers = range(start, min(start + size, num_layers))
        shapes = {k: v for layer in layers for k, v in _layer_shapes(config, layer).items()}
        if start == 0:
            shapes[ends["embed"]] = matrix
        if layers[-1] == num_layers - 1:
            shapes |= {"model.norm.weight": (config["hidden_size"],), ends["head"]: matrix}
        yield {name: _weights(shape, generator) for name, shape in shapes.items()}


def _weights(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return (torch.randn(shape, generator=generator) * 0.02).bfloat16()


def _layer_shapes(config: dict[str, Any], layer: int) -> dict[str, tuple[int, ...]]:
    H, D = config["hidden_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * D, config["num_key_value_heads"] * D
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm": (H,), "post_attention_layernorm": (H,),
        "self_attn.q_proj": (q, H), "self_attn.k_proj": (kv, H), "self_attn.v_proj": (kv, H),
        "self_attn.o_proj": (H, q),
    }  # fmt: skip
    blocks = ["mlp"]
    if "num_experts" in config:
        shapes |= {"self_attn.q_norm": (D,), "self_attn.k_norm": (D,)}
        shapes["mlp.gate"] = (config["num_experts"], H)
        blocks = [f"mlp.experts.{expert}" for expert in range(config["num_experts"])]
    for block in blocks:
        intermediate = config["moe_intermediate_size" if len(blocks) > 1 else "intermediate_size"]
        shapes |= {f"{block}.{name}_proj": (intermediate, H) for name in ("gate", "up")}
        shapes[f"{block}.down_proj"] = (H, intermediate)
    return {f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()}


def _write(folder: Path, config: dict[str, Any], parts: Iterator[Tensors]) -> None:
    folder.mkdir(parents=True)
    weight_map = {}
    for number, tensors in enumerate(parts, 1):
        file = f"model-{number:05}-of-{_NUM_PARTS:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _fp8(folder: Path) -> None:
    """The random Llama with an FP8 scale a channel, as SGLang's own loader reads it."""
    source = folder.parent / "bf16"
    _write(source, _LLAMA, _random_parts(_LLAMA))
    preset = folder.parent / "fp8.yaml"
    preset.write_text('version: 1\nrules:\n  - {match: "*_proj", method: fp8_channel}\n')
    words = ["convert", "--model", source, "--preset", preset, "--out", folder, "--device", "cpu",
             "--max-shard-size", "350MB"]  # fmt: skip
    if main([str(word) for word in words]):
        raise RuntimeError("the conversion failed")
    shutil.rmtree(source)
    config = {**_LLAMA, "quantization_config": {"quant_method": "w8a8_fp8"}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


_FP8_RULES = _DENSE_RULES.replace("bf16", "fp8_channel")

CASES = (
    Case("random Llama of 1.1 G weights", _random(_LLAMA), _DENSE_RULES, is_large=True),
    Case("the same in FP8, a scale a channel", _fp8, _FP8_RULES, is_large=True),
    Case("SmolLM2-135M-Instruct, widened", _real, _DENSE_RULES),
    Case("random Qwen3-MoE, 4 layers of 128 tiny experts", _random(_QWEN3_MOE), _EXPERTS_RULES),
)
