"""The widened SmolLM2 as a mixture of experts, without training.

Mixtral's architecture, each expert a copy of the layer's MLP behind a random router. The weights
of a token's experts sum to one, so the output is the dense model's, whatever the router does.
"""

from __future__ import annotations

from typing import Any

import torch

NUM_EXPERTS = 4
EXPERTS_PER_TOKEN = 2
_SEED = 2026
# Mixtral's names of a dense MLP's projections
_PROJECTIONS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def experts_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config.json of the mixture of a dense Llama's config.json.

    `lm_head` is written out: SGLang's Mixtral does not tie it to the embedding.
    """
    dropped = {"attention_bias", "mlp_bias"}
    return {key: value for key, value in config.items() if key not in dropped} | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": NUM_EXPERTS,
        "num_experts_per_tok": EXPERTS_PER_TOKEN,
        "router_aux_loss_coef": 0.0,
        "output_router_logits": False,
        "sliding_window": None,
        "tie_word_embeddings": False,
    }


def experts_tensors(
    tensors: dict[str, torch.Tensor], config: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Return the tensors of the mixture.

    Args:
        tensors: of the dense model, bf16.
        config: its config.json.
    """
    generator = torch.Generator().manual_seed(_SEED)
    made: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        block, _, rest = name.partition(".mlp.")
        if not rest:
            made[name] = tensor
            continue
        projection = _PROJECTIONS[rest.removesuffix(".weight")]
        for expert in range(NUM_EXPERTS):
            made[f"{block}.block_sparse_moe.experts.{expert}.{projection}.weight"] = tensor.clone()
    for layer in range(config["num_hidden_layers"]):
        router = torch.randn(NUM_EXPERTS, config["hidden_size"], generator=generator)
        name = f"model.layers.{layer}.block_sparse_moe.gate.weight"
        made[name] = router.to(torch.bfloat16)
    made["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    return made
