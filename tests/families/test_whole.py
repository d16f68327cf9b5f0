"""Checkpoints of every family that lack a tensor, or have one letter of a name wrong.

Names and shapes are those that transformers saves its own models under, built without weights.
"""

from __future__ import annotations

import functools
import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion

from mixedprec_plugin.checkpoint.headers import StoredTensor
from mixedprec_plugin.checkpoint.source import Source
from mixedprec_plugin.errors import Problem
from mixedprec_plugin.families.table import FAMILIES
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.plan.resolve import resolve_plan
from tests.presets import preset

Shapes = Mapping[str, tuple[int, ...]]
# of what a config class has of them
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 48, "vocab_size": 128,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "num_experts": 3, "num_local_experts": 3, "n_routed_experts": 3, "num_experts_per_tok": 2,
    "moe_num_experts": 3, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16, "v_head_dim": 16, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "shared_expert_intermediate_size": 48, "depth": 2,
    "pad_token_id": 0,
}  # fmt: skip
# what published config.json say and transformers leaves out
PUBLISHED = {"deepseek_v32": {"topk_method": "noaux_tc"}}
# architecture -> what transformers calls its config; the larger models have two
MODELS = {
    "ApertusForCausalLM": "apertus", "ArceeForCausalLM": "arcee", "CohereForCausalLM": "cohere",
    "Cohere2ForCausalLM": "cohere2", "DeepseekV2ForCausalLM": "deepseek_v2",
    "DeepseekV3ForCausalLM": "deepseek_v3", "DeepseekV32ForCausalLM": "deepseek_v32",
    "Ernie4_5ForCausalLM": "ernie4_5", "Ernie4_5_MoeForCausalLM": "ernie4_5_moe",
    "Exaone4ForCausalLM": "exaone4", "GemmaForCausalLM": "gemma", "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text", "Gemma3ForConditionalGeneration": "gemma3",
    "Glm4ForCausalLM": "glm4", "Glm4MoeForCausalLM": "glm4_moe", "GptOssForCausalLM": "gpt_oss",
    "GraniteForCausalLM": "granite", "GraniteMoeForCausalLM": "granitemoe",
    "LlamaForCausalLM": "llama", "MiniMaxM2ForCausalLM": "minimax_m2",
    "Ministral3ForCausalLM": "ministral3", "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral", "NemotronForCausalLM": "nemotron",
    "Olmo2ForCausalLM": "olmo2", "Olmo3ForCausalLM": "olmo3", "OlmoeForCausalLM": "olmoe",
    "Phi3ForCausalLM": "phi3", "PhimoeForCausalLM": "phimoe", "Qwen2ForCausalLM": "qwen2",
    "Qwen2MoeForCausalLM": "qwen2_moe", "Qwen2VLForConditionalGeneration": "qwen2_vl",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl", "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe", "Qwen3NextForCausalLM": "qwen3_next",
    "Qwen3VLForConditionalGeneration": "qwen3_vl",
    "Qwen3VLMoeForConditionalGeneration": "qwen3_vl_moe",
    "Qwen3_5ForCausalLM": "qwen3_5_text", "Qwen3_5ForConditionalGeneration": "qwen3_5",
    "Qwen3_5MoeForCausalLM": "qwen3_5_moe_text",
    "Qwen3_5MoeForConditionalGeneration": "qwen3_5_moe", "SeedOssForCausalLM": "seed_oss",
    "SmolLM3ForCausalLM": "smollm3", "StableLmForCausalLM": "stablelm",
    "Starcoder2ForCausalLM": "starcoder2", "VaultGemmaForCausalLM": "vaultgemma",
}  # fmt: skip
# what other models' checkpoints are: transformers has them, and nothing is known of them here
UNKNOWN = {
    "AfmoeForCausalLM": "afmoe", "FalconH1ForCausalLM": "falcon_h1", "GPT2LMHeadModel": "gpt2",
    "Glm4vForConditionalGeneration": "glm4v", "GraniteMoeHybridForCausalLM": "granitemoehybrid",
    "KimiLinearForCausalLM": "kimi_linear", "Lfm2ForCausalLM": "lfm2",
    "Llama4ForCausalLM": "llama4_text", "Llama4ForConditionalGeneration": "llama4",
    "LlavaForConditionalGeneration": "llava", "MambaForCausalLM": "mamba",
    "MiniMaxM3SparseForConditionalGeneration": "minimax_m3_vl",
    "Mistral3ForConditionalGeneration": "mistral3", "MllamaForConditionalGeneration": "mllama",
    "NemotronHForCausalLM": "nemotron_h", "OPTForCausalLM": "opt", "PhiForCausalLM": "phi",
    "Qwen3OmniMoeThinkerForConditionalGeneration": "qwen3_omni_moe_thinker",
    "ZayaForCausalLM": "zaya",
}  # fmt: skip


@functools.cache
def saved(architecture: str, model_type: str, num_layers: int = 4) -> tuple[dict[str, Any], Shapes]:
    """config.json and the shapes of what transformers saves of a small model."""
    config = transformers.AutoConfig.for_model(model_type)
    sizes = {**SIZES, "num_hidden_layers": num_layers}
    for part in (config, config.get_text_config()):
        _shrink(part, sizes)
    if (vision := getattr(config, "vision_config", None)) is not None:
        _shrink(vision, {"num_hidden_layers": 2, "depth": 2})
    with torch.device("meta"):
        model = getattr(transformers, architecture)(config)
    tensors = revert_weight_conversion(model, dict(model.state_dict()))
    said = json.loads(json.dumps(model.config.to_dict(), default=str))
    is_tied = said.get("tie_word_embeddings") or (said.get("text_config") or {}).get(
        "tie_word_embeddings"
    )
    left_out = [name for name in tensors if is_tied and name.endswith("lm_head.weight")]
    shapes = {n: tuple(t.shape) for n, t in tensors.items() if n not in left_out}
    published = PUBLISHED.get(model_type, {})
    return {**said, **published, "architectures": [architecture], "dtype": "bfloat16"}, shapes


def _shrink(config: Any, sizes: Mapping[str, int]) -> None:
    for key, size in sizes.items():
        value = getattr(config, key, "")
        if type(value) is int or (value is None and key == "num_key_value_heads"):
            setattr(config, key, size)
    for key, value in list(vars(config).items()):
        if key in ("layer_types", "mlp_layer_types", "no_rope_layers") and value:
            setattr(config, key, value[: sizes["num_hidden_layers"]])


class Planner:
    """Plans checkpoints of nothing but headers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.preset = preset(folder, 'match: "*", method: bf16')

    def problems(self, config: Mapping[str, Any], shapes: Shapes) -> list[Problem]:
        file = self.folder / "model.safetensors"
        tensors = {
            name: StoredTensor(name, "BF16", shape, file, 0, 2 * math.prod(shape))
            for name, shape in shapes.items()
        }
        made = resolve_plan(self.preset, Source("model", self.folder, config, tensors), Target())
        return [problem for problem in made.errors if problem.rule == "whole-model"]


@pytest.fixture
def planner(tmp_path: Path) -> Planner:
    return Planner(tmp_path)


def is_named(tensor: str, problems: list[Problem]) -> bool:
    """Whether a problem names the layer that a tensor is the weight of, or the tensor."""
    layer = tensor.removesuffix(".weight")
    named = [name for problem in problems for name in problem.where.split(", ")]
    # of experts in one tensor, single ones are missing
    experts = layer.rpartition(".")[0] if layer.endswith(".experts.gate_up_proj") else layer
    return any(name == layer or name.startswith(f"{experts}.") for name in named)


EVERY = pytest.mark.parametrize(("architecture", "model_type"), MODELS.items(), ids=MODELS)


def test_every_known_family_of_transformers_is_here() -> None:
    known = {name for family in FAMILIES for name in (*family.architectures, *family.model_types)}
    # part of larger models, or their code comes with the checkpoints
    others = {"baichuan", "kimi_k2", "minicpm", "ministral", "t5gemma"}
    here = {*MODELS, *MODELS.values(), *(f"{name}_text" for name in MODELS.values())}
    assert known - others <= here


@EVERY
def test_whole_checkpoint_is_whole(planner: Planner, architecture: str, model_type: str) -> None:
    for num_layers in (4, 2, 1):
        assert planner.problems(*saved(architecture, model_type, num_layers)) == []


@pytest.mark.parametrize(("architecture", "model_type"), UNKNOWN.items(), ids=UNKNOWN)
def test_nothing_is_held_against_a_whole_checkpoint_of_an_unknown_family(
    planner: Planner, architecture: str, model_type: str
) -> None:
    assert planner.problems(*saved(architecture, model_type)) == []


@EVERY
def test_tensor_that_is_missing_is_named(
    planner: Planner, architecture: str, model_type: str
) -> None:
    config, shapes = saved(architecture, model_type)
    for name in shapes:
        problems = planner.problems(config, {n: s for n, s in shapes.items() if n != name})
        assert is_named(name, problems), (name, problems)


@EVERY
def test_wrong_letter_in_a_name_is_told(
    planner: Planner, architecture: str, model_type: str
) -> None:
    config, shapes = saved(architecture, model_type)
    place = random.Random(architecture)
    for name in place.sample(sorted(shapes), min(len(shapes), 25)):
        at = place.choice([i for i, letter in enumerate(name) if letter.isalpha()])
        wrong = f"{name[:at]}{'x' if name[at] != 'x' else 'y'}{name[at + 1 :]}"
        renamed = {wrong if n == name else n: shape for n, shape in shapes.items()}
        assert planner.problems(config, renamed), (name, wrong)
