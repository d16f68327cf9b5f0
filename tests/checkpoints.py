"""Small checkpoints of real architectures, written with the safetensors library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.published import GPT_OSS_QUANTIZATION


def llama_config(**changes: Any) -> dict[str, Any]:
    """config.json of a Llama whose every dimension is a multiple of 128."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_hidden_layers": 3,
        "vocab_size": 320,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
        **changes,
    }


def llama_tensors(config: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Random weights for `llama_config`."""
    generator = torch.Generator().manual_seed(0)
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}self_attn.q_proj.weight": (q, hidden),
            f"{prefix}self_attn.k_proj.weight": (kv, hidden),
            f"{prefix}self_attn.v_proj.weight": (kv, hidden),
            f"{prefix}self_attn.o_proj.weight": (hidden, q),
            f"{prefix}post_attention_layernorm.weight": (hidden,),
            f"{prefix}mlp.gate_proj.weight": (inner, hidden),
            f"{prefix}mlp.up_proj.weight": (inner, hidden),
            f"{prefix}mlp.down_proj.weight": (hidden, inner),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return {
        name: (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(dtype)
        for name, shape in shapes.items()
    }


def write_checkpoint(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], parts: int = 1
) -> Path:
    """Write config.json and the tensors, in one file or in several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    if parts == 1:
        save_file(dict(tensors), folder / "model.safetensors")
        return folder
    weight_map = {}
    names = list(tensors)
    for part in range(parts):
        file_name = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        chosen = names[part::parts]
        save_file({name: tensors[name] for name in chosen}, folder / file_name)
        weight_map |= dict.fromkeys(chosen, file_name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_llama(folder: Path, parts: int = 1, **changes: Any) -> Path:
    """Write a small random Llama."""
    config = llama_config(**changes)
    return write_checkpoint(folder, config, llama_tensors(config), parts)


def write_mixtral(folder: Path, num_experts: int = 4, **changes: Any) -> Path:
    """Write a small random Mixtral, its head untied."""
    config = llama_config(
        architectures=["MixtralForCausalLM"],
        model_type="mixtral",
        num_local_experts=num_experts,
        num_experts_per_tok=2,
        tie_word_embeddings=False,
        **changes,
    )
    tensors = {n: t for n, t in llama_tensors(config).items() if ".mlp." not in n}
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    generator = torch.Generator().manual_seed(1)
    for layer in range(config["num_hidden_layers"]):
        moe = f"model.layers.{layer}.block_sparse_moe."
        shapes = {f"{moe}gate.weight": (num_experts, hidden)}
        for expert in range(num_experts):
            shapes[f"{moe}experts.{expert}.w1.weight"] = (inner, hidden)
            shapes[f"{moe}experts.{expert}.w2.weight"] = (hidden, inner)
            shapes[f"{moe}experts.{expert}.w3.weight"] = (inner, hidden)
        for name, shape in shapes.items():
            weight = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
            tensors[name] = weight.to(torch.bfloat16)
    return write_checkpoint(folder, config, tensors)


def gpt_oss_config(**changes: Any) -> dict[str, Any]:
    """config.json of a gpt-oss of two layers and four experts."""
    return {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": 128,
        "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 64, "num_hidden_layers": 2, "vocab_size": 512, "num_local_experts": 4,
        "num_experts_per_tok": 2, "attention_bias": True, "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"], "hidden_act": "silu",
        "swiglu_limit": 7.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "max_position_embeddings": 131072, "initial_context_length": 4096, "pad_token_id": 0,
        "bos_token_id": 2, "eos_token_id": 1,
        "rope_parameters": {
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "truncate": False, "original_max_position_embeddings": 4096, "rope_theta": 150000.0,
        },
        "torch_dtype": "bfloat16",
        "quantization_config": GPT_OSS_QUANTIZATION,
        **changes,
    }  # fmt: skip


def write_gpt_oss(folder: Path, **changes: Any) -> Path:
    """A random gpt-oss, its experts in MXFP4 as openai/gpt-oss-20b has them."""
    config = gpt_oss_config(**changes)
    generator = torch.Generator().manual_seed(0)
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    count, tensors = config["num_local_experts"], {}

    def floats(name: str, *shape: int, scale: float = 1.0, mean: float = 0.0) -> None:
        values = mean + scale * torch.randn(shape, generator=generator)
        tensors[name] = values.bfloat16()

    def linear(name: str, N: int, K: int) -> None:
        floats(f"{name}.weight", N, K, scale=1.5 * K**-0.5)
        floats(f"{name}.bias", N, scale=0.3)

    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            floats(f"{block}.{norm}.weight", hidden, scale=0.1, mean=1.0)
        for name, N, K in (
            ("q", q, hidden),
            ("k", kv, hidden),
            ("v", kv, hidden),
            ("o", hidden, q),
        ):
            linear(f"{block}.self_attn.{name}_proj", N, K)
        floats(f"{block}.self_attn.sinks", config["num_attention_heads"])
        linear(f"{block}.mlp.router", count, hidden)
        for name, N, K in (("gate_up", 2 * inner, hidden), ("down", hidden, inner)):
            stored, shape = f"{block}.mlp.experts.{name}_proj", (count, N, K // 32)
            for end, sizes, codes in (("blocks", (16,), (0, 256)), ("scales", (), (118, 123))):
                tensors[f"{stored}_{end}"] = torch.randint(
                    *codes, (*shape, *sizes), generator=generator, dtype=torch.uint8
                )
            floats(f"{stored}_bias", count, N, scale=0.3)
    floats("model.norm.weight", hidden, scale=0.1, mean=1.0)
    for name in ("model.embed_tokens", "lm_head"):
        floats(f"{name}.weight", config["vocab_size"], hidden, scale=1.5 * hidden**-0.5)
    return write_checkpoint(folder, config, tensors)
