"""What a config.json says of a model, wherever it says it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mixedprec_plugin.errors import Problem, UsageError

Config = Mapping[str, Any]
TIES_HEAD = "tie_word_embeddings"

_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "rope_theta", "rms_norm_eps",
    "layer_norm_eps", "tie_word_embeddings", "hidden_act", "attention_bias", "num_experts",
    "num_local_experts", "n_routed_experts", "num_experts_per_tok", "n_shared_experts",
    "moe_intermediate_size", "shared_expert_intermediate_size", "first_k_dense_replace",
    "q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim",
    "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim",
    "linear_value_head_dim",
)  # fmt: skip
# whose class in transformers ties the head where config.json does not say it
_TIED = frozenset({
    "bloom", "cohere", "cohere2", "cohere2_moe", "ernie4_5", "ernie4_5_moe", "falcon",
    "falcon_mamba", "gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text",
    "gemma4", "gemma4_text", "gpt2", "gpt_bigcode", "gpt_neo", "jetmoe", "lfm2", "lfm2_moe",
    "mamba", "minicpm3", "mpt", "opt", "recurrent_gemma", "smollm3", "starcoder2", "vaultgemma",
    "xglm", "zamba", "zamba2",
})  # fmt: skip
# where SGLang asks the larger model (models/qwen2_vl.py:482, qwen2_5_vl.py:727, qwen3_vl.py:1349)
_ASKED_ABOVE = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"}
_DTYPES = {"bfloat16": "BF16", "bf16": "BF16", "float16": "F16", "half": "F16", "fp16": "F16"}


def architecture(config: Config) -> str:
    """The name that SGLang picks its class by; empty where there is none."""
    return str((config.get("architectures") or [""])[0])


def is_language_model(config: Config) -> bool:
    """Whether it is a whole language model, and no draft model, encoder or part of one."""
    return architecture(config).endswith(("ForCausalLM", "ForConditionalGeneration", "LMHeadModel"))


def is_config(data: Mapping[str, Any]) -> bool:
    """Whether a mapping is a model's config.json, by the keys that every one has."""
    return "architectures" in data or "model_type" in data


def text_config(config: Config) -> Config:
    """What is said of the language model: its `text_config`, where it has one, goes first."""
    text = config.get("text_config")
    return {**config, **text} if isinstance(text, Mapping) else config


def model_type(config: Config) -> str:
    """The `model_type` of the language model."""
    return str(text_config(config).get("model_type") or config.get("model_type") or "")


def ties_head(config: Config) -> bool:
    """Whether the head shares the embedding's weight: as config.json says, or else its class."""
    said = config.get(TIES_HEAD)
    if said is None and config.get("model_type") not in _ASKED_ABOVE:
        said = text_config(config).get(TIES_HEAD)
        said = model_type(config) in _TIED if said is None else said
    return bool(said)


def count_of(section: Config, *keys: str) -> int:
    """The first of some counts that a config.json says; 0 where it says none."""
    counts = (section.get(key) for key in keys)
    return next((n for n in counts if isinstance(n, int) and not isinstance(n, bool)), 0)


# key of a number -> of which of two kinds block i of so many is by it; as SGLang's
# models/{deepseek_v2,qwen2_moe,llama4,ernie4,gemma3n_causal}.py read them
_KINDS_BY_NUMBER: Mapping[str, Callable[[int, int, int], bool]] = {
    **dict.fromkeys(
        ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "num_hash_layers"),
        lambda i, number, _: i < number,
    ),
    "moe_layer_end_index": lambda i, number, _: i > number,
    "num_kv_shared_layers": lambda i, number, count: i >= count - number,
    "moe_layer_freq": lambda i, number, _: i % number == 0,
    **dict.fromkeys(
        (
            "decoder_sparse_step", "interleave_moe_layer_step", "full_attention_interval",
            "moe_layer_interval",
        ),
        lambda i, number, _: (i + 1) % number == 0,
    ),
}  # fmt: skip


def block_kind(config: Config, block: int) -> object:
    """What config.json says of a decoder block by which it may hold other layers than its siblings.

    Its entry in every list or text of one entry a block (`layer_types`), whether lists of numbers
    name it (`mlp_only_layers`), and the ranges of `_KINDS_BY_NUMBER`.
    """
    said = text_config(config)
    count = count_of(said, "num_hidden_layers")
    found: list[object] = [block >= count]
    nested = [value for value in said.values() if isinstance(value, Mapping)]
    for key, value in [item for section in (said, *nested) for item in section.items()]:
        is_entry = isinstance(value, list) or (isinstance(value, str) and "pattern" in key)
        if is_entry and len(value) == count and block < count:
            found.append(str(value[block]))
        elif isinstance(value, list) and value and all(isinstance(n, int) for n in value):
            found.append((block in value, block + 1 in value))
        elif isinstance(value, int) and value > 0 and key in _KINDS_BY_NUMBER:
            found.append(_KINDS_BY_NUMBER[key](block, value, count))
    return tuple(found)


def num_kv_ranks(config: Config, tp_size: int) -> int:
    """How many ranks split the key and value heads; SGLang repeats them where they are fewer."""
    return min(tp_size, int(text_config(config).get("num_key_value_heads") or tp_size))


def sizes(config: Config) -> dict[str, Any]:
    """What two checkpoints of one model have in common, as far as it is said or follows.

    What is said layer by layer, in a list, is left out.
    """
    said = dict(text_config(config))
    rope = said.get("rope_parameters")
    if isinstance(rope, Mapping) and "rope_theta" in rope:
        said.setdefault("rope_theta", rope["rope_theta"])
    heads, hidden = said.get("num_attention_heads"), said.get("hidden_size")
    if isinstance(heads, int) and heads and hidden and not said.get("head_dim"):
        said["head_dim"] = hidden // heads
    if heads and said.get("num_key_value_heads") is None:
        said["num_key_value_heads"] = heads
    plain = {key: said.get(key) for key in _SIZES}
    return {key: value for key, value in plain.items() if isinstance(value, int | float | str)}


def model_dtype(config: Config, dtype: str = "auto") -> str:
    """Tell the dtype that SGLang runs a model in.

    Source: sglang/srt/configs/model_config.py, `_get_and_verify_dtype`.

    Args:
        dtype: SGLang's --dtype; `auto` takes the checkpoint's, and float16 for float32 ones.
    Returns:
        `BF16` or `F16`.
    Raises:
        UsageError: the dtype is none that quantized layers run in.
    """
    if dtype != "auto":
        if dtype not in _DTYPES:
            what = f"{dtype!r} cannot hold mixed precision (expected bfloat16, float16)"
            raise UsageError(Problem("--dtype", what))
        return _DTYPES[dtype]
    is_gemma = str(config.get("model_type", "")).startswith("gemma")
    return _DTYPES.get(_declared_dtype(config), "BF16" if is_gemma else "F16")


def is_half_precision(config: Config) -> bool:
    """Whether a checkpoint says that it is of 16 bits, so that a float32 tensor in it is meant."""
    return _declared_dtype(config) in _DTYPES


def _declared_dtype(config: Config) -> str:
    sections = (config, config.get("text_config") or {})
    said = (section.get(key) for section in sections for key in ("dtype", "torch_dtype"))
    return str(next(filter(None, said), "float32")).removeprefix("torch.")
