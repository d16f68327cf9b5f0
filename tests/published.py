"""config.json and tensor names of published models, as their pages and model code give them.

Only what a plan reads is here; every shape follows from the config, as in transformers' model code.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.headers import Header, write_headers


@dataclasses.dataclass(frozen=True)
class Published:
    """A model: its config.json, its tensors, and in how many files they come."""

    config: Mapping[str, Any]
    tensors: Header
    parts: int

    def write(self, folder: Path) -> Path:
        """Write it as a checkpoint without weights."""
        return write_headers(folder, self.config, self.tensors, self.parts)


_METHODS = ("method: fp8_block", "method: awq, requantize: true", "method: int8, requantize: true")


def single_expert_rules(made: Published) -> str:
    """Lines of a preset: ten rules for each layer of experts, each naming twenty of them."""
    chance = random.Random(0)
    num_experts = int(made.config["n_routed_experts"])
    first, last = int(made.config["first_k_dense_replace"]), int(made.config["num_hidden_layers"])
    lines = []
    for layer in range(first, last):
        for number in range(10):
            ids = ",".join(str(e) for e in sorted(chance.sample(range(num_experts), 20)))
            match = f"model.layers.{layer}.mlp.experts.{{{ids}}}.*"
            method = _METHODS[number % len(_METHODS)]
            lines.append(f'  - {{match: "{match}", {method}, optional: true}}\n')
    return "".join(lines)


class _Tensors:
    """Collects tensors; in block FP8 where the checkpoint is."""

    def __init__(self, *, is_fp8: bool = False) -> None:
        self.all: dict[str, tuple[str, tuple[int, ...]]] = {}
        self.is_fp8 = is_fp8

    def plain(self, name: str, *shape: int, dtype: str = "BF16") -> None:
        self.all[name] = (dtype, shape)

    def linear(self, name: str, N: int, K: int, *, has_bias: bool = False) -> None:
        self.all[f"{name}.weight"] = ("F8_E4M3" if self.is_fp8 else "BF16", (N, K))
        if self.is_fp8:
            self.all[f"{name}.weight_scale_inv"] = ("F32", (-(-N // 128), -(-K // 128)))
        if has_bias:
            self.all[f"{name}.bias"] = ("BF16", (N,))

    def mlp(self, name: str, hidden: int, inner: int) -> None:
        self.linear(f"{name}.gate_proj", inner, hidden)
        self.linear(f"{name}.up_proj", inner, hidden)
        self.linear(f"{name}.down_proj", hidden, inner)

    def attention(self, name: str, config: Mapping[str, Any], *, has_bias: bool = False) -> None:
        hidden, head = config["hidden_size"], config["head_dim"]
        q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
        self.linear(f"{name}.q_proj", q, hidden, has_bias=has_bias)
        self.linear(f"{name}.k_proj", kv, hidden, has_bias=has_bias)
        self.linear(f"{name}.v_proj", kv, hidden, has_bias=has_bias)
        self.linear(f"{name}.o_proj", hidden, q)

    def ends(self, config: Mapping[str, Any], head: str = "lm_head") -> None:
        hidden, vocab = config["hidden_size"], config["vocab_size"]
        self.plain("model.embed_tokens.weight", vocab, hidden)
        self.plain("model.norm.weight", hidden)
        if head:
            self.plain(f"{head}.weight", vocab, hidden)

    def norms(self, block: str, hidden: int) -> None:
        self.plain(f"{block}.input_layernorm.weight", hidden)
        self.plain(f"{block}.post_attention_layernorm.weight", hidden)

    def router(self, name: str, num_experts: int, hidden: int, *, has_bias: bool = False) -> None:
        self.plain(f"{name}.weight", num_experts, hidden)
        if has_bias:
            self.plain(f"{name}.e_score_correction_bias", num_experts, dtype="F32")

    def draft_parts(self, block: str, config: Mapping[str, Any]) -> None:
        """What a layer of multi-token prediction has beside a decoder layer."""
        hidden, vocab = config["hidden_size"], config["vocab_size"]
        self.plain(f"{block}.embed_tokens.weight", vocab, hidden)
        self.plain(f"{block}.enorm.weight", hidden)
        self.plain(f"{block}.hnorm.weight", hidden)
        self.plain(f"{block}.eh_proj.weight", hidden, 2 * hidden)
        self.plain(f"{block}.shared_head.norm.weight", hidden)
        self.plain(f"{block}.shared_head.head.weight", vocab, hidden)


def llama_3_1_8b(num_layers: int = 32) -> Published:
    """meta-llama/Llama-3.1-8B-Instruct, bf16."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
        "num_hidden_layers": num_layers, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 14336, "hidden_act": "silu",
        "tie_word_embeddings": False, "vocab_size": 128256, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16",
    }  # fmt: skip
    tensors = _Tensors()
    tensors.ends(config)
    for layer in range(num_layers):
        block = f"model.layers.{layer}"
        tensors.norms(block, 4096)
        tensors.attention(f"{block}.self_attn", config)
        tensors.mlp(f"{block}.mlp", 4096, 14336)
    return Published(config, tensors.all, 4)


def qwen3_30b_a3b(num_layers: int = 48) -> Published:
    """Qwen/Qwen3-30B-A3B, bf16."""
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048,
        "num_hidden_layers": num_layers, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_experts": 128, "num_experts_per_tok": 8, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "norm_topk_prob": True, "hidden_act": "silu",
        "attention_bias": False, "tie_word_embeddings": False, "vocab_size": 151936,
        "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16",
    }  # fmt: skip
    tensors = _Tensors()
    tensors.ends(config)
    for layer in range(num_layers):
        block = f"model.layers.{layer}"
        tensors.norms(block, 2048)
        tensors.attention(f"{block}.self_attn", config)
        tensors.plain(f"{block}.self_attn.q_norm.weight", 128)
        tensors.plain(f"{block}.self_attn.k_norm.weight", 128)
        tensors.router(f"{block}.mlp.gate", 128, 2048)
        for expert in range(128):
            tensors.mlp(f"{block}.mlp.experts.{expert}", 2048, 768)
    return Published(config, tensors.all, 16)


def mixtral_8x7b(num_layers: int = 32) -> Published:
    """mistralai/Mixtral-8x7B-Instruct-v0.1, bf16."""
    config = {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 4096,
        "num_hidden_layers": num_layers, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 14336, "num_local_experts": 8,
        "num_experts_per_tok": 2, "hidden_act": "silu", "tie_word_embeddings": False,
        "vocab_size": 32000, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    tensors = _Tensors()
    tensors.ends(config)
    for layer in range(num_layers):
        block = f"model.layers.{layer}"
        tensors.norms(block, 4096)
        tensors.attention(f"{block}.self_attn", config)
        tensors.router(f"{block}.block_sparse_moe.gate", 8, 4096)
        for expert in range(8):
            prefix = f"{block}.block_sparse_moe.experts.{expert}"
            tensors.linear(f"{prefix}.w1", 14336, 4096)
            tensors.linear(f"{prefix}.w2", 4096, 14336)
            tensors.linear(f"{prefix}.w3", 14336, 4096)
    return Published(config, tensors.all, 19)


# as openai/gpt-oss-20b says it
GPT_OSS_QUANTIZATION = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
    ],
}  # fmt: skip


def gpt_oss_20b() -> Published:
    """openai/gpt-oss-20b: experts in MXFP4, all of a layer in one tensor."""
    num_layers, num_experts, hidden, inner, num_heads = 24, 32, 2880, 2880, 64
    config = {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": hidden,
        "num_hidden_layers": num_layers, "num_attention_heads": num_heads,
        "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": inner,
        "num_local_experts": num_experts, "num_experts_per_tok": 4, "attention_bias": True,
        "sliding_window": 128, "swiglu_limit": 7.0, "hidden_act": "silu", "vocab_size": 201088,
        "layer_types": ["sliding_attention", "full_attention"] * (num_layers // 2),
        "tie_word_embeddings": False, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16",
        "quantization_config": GPT_OSS_QUANTIZATION,
    }  # fmt: skip
    tensors = _Tensors()
    tensors.ends(config)
    for layer in range(num_layers):
        block = f"model.layers.{layer}"
        tensors.norms(block, hidden)
        tensors.attention(f"{block}.self_attn", config, has_bias=True)
        tensors.plain(f"{block}.self_attn.o_proj.bias", hidden)
        tensors.plain(f"{block}.self_attn.sinks", num_heads)
        tensors.linear(f"{block}.mlp.router", num_experts, hidden, has_bias=True)
        for name, N, K in (("gate_up", 2 * inner, hidden), ("down", hidden, inner)):
            stored, shape = f"{block}.mlp.experts.{name}_proj", (num_experts, N, K // 32)
            tensors.plain(f"{stored}_blocks", *shape, 16, dtype="U8")
            tensors.plain(f"{stored}_scales", *shape, dtype="U8")
            tensors.plain(f"{stored}_bias", num_experts, N)
    return Published(config, tensors.all, 3)


def glm_4_5_air(num_layers: int = 46) -> Published:
    """zai-org/GLM-4.5-Air, bf16; its last layer predicts further tokens."""
    config = {
        "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "hidden_size": 4096,
        "num_hidden_layers": num_layers, "num_attention_heads": 96, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 10944, "moe_intermediate_size": 1408,
        "n_routed_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 8,
        "first_k_dense_replace": 1, "num_nextn_predict_layers": 1, "attention_bias": True,
        "use_qk_norm": False, "hidden_act": "silu", "tie_word_embeddings": False,
        "vocab_size": 151552, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "routed_scaling_factor": 1.0, "torch_dtype": "bfloat16",
    }  # fmt: skip
    tensors = _Tensors()
    tensors.ends(config)
    for layer in range(num_layers + 1):
        block = f"model.layers.{layer}"
        tensors.norms(block, 4096)
        tensors.attention(f"{block}.self_attn", config, has_bias=True)
        if layer == 0:
            tensors.mlp(f"{block}.mlp", 4096, 10944)
            continue
        tensors.router(f"{block}.mlp.gate", 128, 4096, has_bias=True)
        tensors.mlp(f"{block}.mlp.shared_experts", 4096, 1408)
        for expert in range(128):
            tensors.mlp(f"{block}.mlp.experts.{expert}", 4096, 1408)
    tensors.draft_parts(f"model.layers.{num_layers}", config)
    return Published(config, tensors.all, 47)


def deepseek_v3(num_layers: int = 61) -> Published:
    """deepseek-ai/DeepSeek-V3, block FP8; its last layer predicts further tokens."""
    return _deepseek(
        num_layers,
        num_experts=256,
        num_dense=3,
        num_heads=128,
        vocab=129280,
        num_draft=1,
        parts=163,
    )


def kimi_k2(num_layers: int = 61) -> Published:
    """moonshotai/Kimi-K2-Instruct, block FP8: DeepSeek-V3 with more experts and fewer heads."""
    published = _deepseek(
        num_layers, num_experts=384, num_dense=1, num_heads=64, vocab=163840, num_draft=0, parts=61
    )
    return dataclasses.replace(published, config={**published.config, "model_type": "kimi_k2"})


def _deepseek(
    num_layers: int,
    *,
    num_experts: int,
    num_dense: int,
    num_heads: int,
    vocab: int,
    num_draft: int,
    parts: int,
) -> Published:
    hidden = 7168
    config = {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
        "hidden_size": hidden, "num_hidden_layers": num_layers, "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "n_routed_experts": num_experts, "n_shared_experts": 1,
        "num_experts_per_tok": 8, "first_k_dense_replace": num_dense, "moe_layer_freq": 1,
        "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
        "norm_topk_prob": True, "routed_scaling_factor": 2.5, "max_position_embeddings": 163840,
        "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "num_nextn_predict_layers": num_draft, "hidden_act": "silu",
        "tie_word_embeddings": False, "vocab_size": vocab, "rms_norm_eps": 1e-6,
        "torch_dtype": "bfloat16",
        "quantization_config": {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
    }  # fmt: skip
    tensors = _Tensors(is_fp8=True)
    tensors.ends(config)
    for layer in range(num_layers + num_draft):
        block = f"model.layers.{layer}"
        tensors.norms(block, hidden)
        tensors.linear(f"{block}.self_attn.q_a_proj", 1536, hidden)
        tensors.plain(f"{block}.self_attn.q_a_layernorm.weight", 1536)
        tensors.linear(f"{block}.self_attn.q_b_proj", num_heads * 192, 1536)
        tensors.linear(f"{block}.self_attn.kv_a_proj_with_mqa", 576, hidden)
        tensors.plain(f"{block}.self_attn.kv_a_layernorm.weight", 512)
        tensors.linear(f"{block}.self_attn.kv_b_proj", num_heads * 256, 512)
        tensors.linear(f"{block}.self_attn.o_proj", hidden, num_heads * 128)
        if layer < num_dense:
            tensors.mlp(f"{block}.mlp", hidden, 18432)
            continue
        tensors.router(f"{block}.mlp.gate", num_experts, hidden, has_bias=True)
        tensors.mlp(f"{block}.mlp.shared_experts", hidden, 2048)
        for expert in range(num_experts):
            tensors.mlp(f"{block}.mlp.experts.{expert}", hidden, 2048)
    for layer in range(num_layers, num_layers + num_draft):
        tensors.draft_parts(f"model.layers.{layer}", config)
    return Published(config, tensors.all, parts)
