"""Checkpoints of every family that lack a tensor, or have one letter of a name wrong.

Names and shapes are those that transformers saves its own models under, built without weights.
"""

from __future__ import annotations

import functools
import json
import math
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion

from mixedprec_plugin.checkpoint.headers import DTYPE_BITS, StoredTensor
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
MODELS = (
    "ApertusForCausalLM", "ArceeForCausalLM", "CohereForCausalLM", "Cohere2ForCausalLM",
    "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM",
    "Ernie4_5ForCausalLM", "Ernie4_5_MoeForCausalLM", "Exaone4ForCausalLM", "GemmaForCausalLM",
    "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration",
    "Glm4ForCausalLM", "Glm4MoeForCausalLM", "GptOssForCausalLM", "GraniteForCausalLM",
    "GraniteMoeForCausalLM", "LlamaForCausalLM", "MiniMaxM2ForCausalLM",
    "Ministral3ForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "NemotronForCausalLM",
    "Olmo2ForCausalLM", "Olmo3ForCausalLM", "OlmoeForCausalLM", "Phi3ForCausalLM",
    "PhimoeForCausalLM", "Qwen2ForCausalLM", "Qwen2MoeForCausalLM",
    "Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration", "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM", "Qwen3NextForCausalLM", "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration", "Qwen3_5ForCausalLM",
    "Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForCausalLM",
    "Qwen3_5MoeForConditionalGeneration", "SeedOssForCausalLM", "SmolLM3ForCausalLM",
    "StableLmForCausalLM", "Starcoder2ForCausalLM", "VaultGemmaForCausalLM",
)  # fmt: skip
# what other models' checkpoints are: transformers has them, and nothing is known of them here
UNKNOWN = (
    "BartForCausalLM", "FastVlmForConditionalGeneration",
    "Idefics2ForConditionalGeneration", "InternVLForConditionalGeneration",
    "Ovis2ForConditionalGeneration", "VideoLlama3ForConditionalGeneration", "AfmoeForCausalLM",
    "FalconH1ForCausalLM", "GPT2LMHeadModel",
    "Glm4vForConditionalGeneration", "GraniteMoeHybridForCausalLM", "KimiLinearForCausalLM",
    "Lfm2ForCausalLM", "Llama4ForCausalLM", "Llama4ForConditionalGeneration",
    "LlavaForConditionalGeneration", "MambaForCausalLM",
    "MiniMaxM3SparseForConditionalGeneration", "Mistral3ForConditionalGeneration",
    "MllamaForConditionalGeneration", "NemotronHForCausalLM", "OPTForCausalLM",
    "PhiForCausalLM", "Qwen3OmniMoeThinkerForConditionalGeneration", "ZayaForCausalLM",
)  # fmt: skip


# outside of blocks, towers and what joins them
ENDS = re.compile(r"(?!.*(?:vis|\.\d+\.|multi_modal|image|audio|connector)).*\.weight")


@functools.cache
def saved(architecture: str, num_layers: int = 4) -> tuple[dict[str, Any], Shapes]:
    """config.json and the shapes of what transformers saves of a small model."""
    model_class = getattr(transformers, architecture)
    # `AutoConfig` has SGLang's configs in their place, in a process that imported it
    config = model_class.config_class()
    sizes = {**SIZES, "num_hidden_layers": num_layers}
    for part in (config, config.get_text_config()):
        _shrink(part, sizes)
    if (vision := getattr(config, "vision_config", None)) is not None:
        _shrink(vision, {"num_hidden_layers": 2, "depth": 2})
    with torch.device("meta"):
        model = model_class(config)
    tensors = revert_weight_conversion(model, dict(model.state_dict()))
    said = json.loads(json.dumps(model.config.to_dict(), default=str))
    is_tied = said.get("tie_word_embeddings") or (said.get("text_config") or {}).get(
        "tie_word_embeddings"
    )
    left_out = [name for name in tensors if is_tied and name.endswith("lm_head.weight")]
    shapes = {n: tuple(t.shape) for n, t in tensors.items() if n not in left_out}
    published = PUBLISHED.get(config.model_type, {})
    return {**said, **published, "architectures": [architecture], "dtype": "bfloat16"}, shapes


def _shrink(config: Any, sizes: Mapping[str, int]) -> None:
    for key, size in sizes.items():
        value = getattr(config, key, "")
        if type(value) is int or (value is None and key == "num_key_value_heads"):
            setattr(config, key, size)
    for key, value in list(vars(config).items()):
        if key in ("layer_types", "mlp_layer_types", "no_rope_layers") and value:
            setattr(config, key, value[: sizes["num_hidden_layers"]])


# how tools store an [N, K] weight in 4 bits and groups of 16, or in FP8 and blocks of 16
STORED: Mapping[str, Callable[[int, int], dict[str, tuple[str, tuple[int, ...]]]]] = {
    "gptq": lambda N, K: {
        "qweight": ("I32", (K // 8, N)), "qzeros": ("I32", (K // 16, N // 8)),
        "scales": ("F16", (K // 16, N)), "g_idx": ("I32", (K,)),
    },
    "awq": lambda N, K: {
        "qweight": ("I32", (K, N // 8)), "qzeros": ("I32", (K // 16, N // 8)),
        "scales": ("F16", (K // 16, N)),
    },
    "fp8": lambda N, K: {
        "weight": ("F8_E4M3", (N, K)), "weight_scale_inv": ("F32", (N // 16, K // 16)),
    },
}  # fmt: skip
SAID = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True, "desc_act": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"},
    "fp8": {"quant_method": "fp8", "weight_block_size": [16, 16]},
}


class Planner:
    """Plans checkpoints of nothing but headers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.preset = preset(folder, 'match: "*", method: bf16')

    def problems(self, config: Mapping[str, Any], shapes: Shapes) -> list[Problem]:
        tensors = {name: ("BF16", shape) for name, shape in shapes.items()}
        made = self.errors(config, tensors)
        return [problem for problem in made if problem.rule == "whole-model"]

    def errors(
        self, config: Mapping[str, Any], specs: Mapping[str, tuple[str, tuple[int, ...]]]
    ) -> list[Problem]:
        file = self.folder / "model.safetensors"
        tensors = {
            name: StoredTensor(
                name, dtype, shape, file, 0, DTYPE_BITS[dtype] // 8 * math.prod(shape)
            )
            for name, (dtype, shape) in specs.items()
        }
        source = Source("model", self.folder, config, tensors)
        return list(resolve_plan(self.preset, source, Target()).errors)


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


EVERY = pytest.mark.parametrize("architecture", MODELS)


def test_every_known_family_of_transformers_is_here() -> None:
    # layers of multi-token prediction are SGLang's models, and part of transformers' checkpoints
    families = [family for family in FAMILIES if not family.is_draft]
    known = {name for family in families for name in (*family.architectures, *family.model_types)}
    # part of larger models, or their code comes with the checkpoints
    others = {"baichuan", "kimi_k2", "minicpm", "ministral", "t5gemma"}
    types = {getattr(transformers, name).config_class.model_type for name in MODELS}
    here = {*MODELS, *types, *(f"{name}_text" for name in types)}
    assert known - others <= here


@EVERY
def test_whole_checkpoint_is_whole(planner: Planner, architecture: str) -> None:
    for num_layers in (4, 2, 1):
        assert planner.problems(*saved(architecture, num_layers)) == []


@pytest.mark.parametrize("architecture", UNKNOWN)
def test_nothing_is_held_against_a_whole_checkpoint_of_an_unknown_family(
    planner: Planner, architecture: str
) -> None:
    assert planner.problems(*saved(architecture)) == []


@pytest.mark.parametrize("architecture", UNKNOWN)
def test_first_and_last_layers_of_an_unknown_family_are_missed(
    planner: Planner, architecture: str
) -> None:
    config, shapes = saved(architecture)
    text = {**config, **(config.get("text_config") or {})}
    rows = {text["vocab_size"], text["vocab_size"] + 8}
    ends = [
        name
        for name, shape in shapes.items()
        if ENDS.fullmatch(name) and (shape[0] in rows or re.search(r"(norm|_f)\.weight$", name))
    ]
    assert ends
    for name in ends:
        problems = planner.problems(config, {n: s for n, s in shapes.items() if n != name})
        assert problems, name


@EVERY
def test_tensor_that_is_missing_is_named(planner: Planner, architecture: str) -> None:
    config, shapes = saved(architecture)
    for name in shapes:
        problems = planner.problems(config, {n: s for n, s in shapes.items() if n != name})
        assert is_named(name, problems), (name, problems)


@pytest.mark.parametrize("method", STORED)
@pytest.mark.parametrize(
    "architecture",
    ["LlamaForCausalLM", "DeepseekV3ForCausalLM", "Qwen3_5MoeForCausalLM", "Phi3ForCausalLM"],
)
def test_scale_or_zero_point_that_is_missing_is_named(
    planner: Planner, architecture: str, method: str
) -> None:
    config, shapes = saved(architecture)
    one_by_one = dict(shapes)
    for name in [name for name in shapes if name.endswith(".experts.gate_up_proj")]:
        count, rows, hidden = one_by_one.pop(name)
        del one_by_one[f"{name.removesuffix('gate_up_proj')}down_proj"]
        for expert in range(count):
            prefix = f"{name.removesuffix('gate_up_proj')}{expert}"
            one_by_one |= {f"{prefix}.{x}_proj.weight": (rows // 2, hidden) for x in ("gate", "up")}
            one_by_one[f"{prefix}.down_proj.weight"] = (hidden, rows // 2)
    specs: dict[str, tuple[str, tuple[int, ...]]] = {}
    quantized = []
    for name, shape in one_by_one.items():
        layer = name.removesuffix(".weight")
        is_coded = layer.endswith("_proj") and name != layer and all(n % 16 == 0 for n in shape)
        if is_coded:
            quantized.append(layer)
            parts = STORED[method](*shape)
            specs |= {f"{layer}.{suffix}": spec for suffix, spec in parts.items()}
        else:
            specs[name] = ("BF16", shape)
    config = {**config, "quantization_config": SAID[method]}
    assert len(quantized) > 12
    assert planner.errors(config, specs) == []
    # one block, and of its experts one
    block = [layer for layer in quantized if re.search(r"\.1\.(?!.*experts\.[1-9])", layer)]
    for layer in block:
        for suffix in STORED[method](16, 16).keys() - {"g_idx"}:
            left = {name: spec for name, spec in specs.items() if name != f"{layer}.{suffix}"}
            problems = planner.errors(config, left)
            assert any(layer in problem.where for problem in problems), (layer, suffix, problems)


@EVERY
def test_wrong_letter_in_a_name_is_told(planner: Planner, architecture: str) -> None:
    config, shapes = saved(architecture)
    place = random.Random(architecture)
    for name in place.sample(sorted(shapes), min(len(shapes), 25)):
        at = place.choice([i for i, letter in enumerate(name) if letter.isalpha()])
        wrong = f"{name[:at]}{'x' if name[at] != 'x' else 'y'}{name[at + 1 :]}"
        renamed = {wrong if n == name else n: shape for n, shape in shapes.items()}
        assert planner.problems(config, renamed), (name, wrong)
