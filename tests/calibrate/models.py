"""Small models of transformers' own classes, with random weights and a tokenizer of words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    ArceeConfig,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3MoeConfig,
    Starcoder2Config,
)

VOCABULARY = 96
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def config_of(kind: str, sizes: Mapping[str, int]) -> Any:
    dense = {
        "llama": LlamaConfig, "qwen2": Qwen2Config, "gemma3_text": Gemma3TextConfig,
        "arcee": ArceeConfig, "starcoder2": Starcoder2Config,
    }  # fmt: skip
    if kind == "llama with biases":
        return LlamaConfig(**sizes, attention_bias=True, mlp_bias=True)
    if kind in dense:
        return dense[kind](**sizes)
    return Qwen3MoeConfig(
        **{"moe_intermediate_size": 32, **sizes}, num_experts=4, num_experts_per_tok=2,
        decoder_sparse_step=1, norm_topk_prob=True,
    )  # fmt: skip


def write_model(
    folder: Path, kind: str = "llama", seed: int = 0, sizes: Mapping[str, int] = SIZES
) -> Any:
    """Save a model and its tokenizer; returns the model, in float32."""
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(config_of(kind, sizes), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                # louder than usual: predictions that are not all alike
                parameter.normal_(0, 0.6 if "embed" in name else 0.25)
            parameter.copy_(parameter.bfloat16())
    model.to(torch.bfloat16).save_pretrained(folder)
    words = {f"w{i}": i for i in range(3, VOCABULARY)} | {"<unk>": 0, "<s>": 1, "</s>": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    ).save_pretrained(folder)
    # read again: frequencies of rotary embeddings went to bfloat16 as well
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def write_words(path: Path, count: int = 600) -> Path:
    """A text of so many words that the tokenizer knows, drawn at random."""
    drawn = torch.randint(3, VOCABULARY, (count,), generator=torch.Generator().manual_seed(5))
    path.write_text(" ".join(f"w{word}" for word in drawn.tolist()), encoding="utf-8")
    return path
