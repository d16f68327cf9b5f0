"""What the plan refuses of a whole family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mixedprec_plugin.methods.cards import find_gpu
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.plan.family_checks import why_not_family
from tests import published
from tests.checkpoints import llama_config, llama_tensors, write_checkpoint
from tests.presets import plan, problem_texts

OLMOE: dict[str, Any] = {
    "architectures": ["OlmoeForCausalLM"], "num_attention_heads": 16, "num_key_value_heads": 16,
}  # fmt: skip


def test_olmoe_is_refused_on_several_ranks() -> None:
    (problem,) = why_not_family(OLMOE, Target(tp_size=2))
    assert "does not on 2 tensor-parallel ranks" in str(problem)


def test_olmoe_runs_on_one_rank() -> None:
    assert why_not_family(OLMOE, Target()) == []


def test_olmoe_with_grouped_heads_is_refused() -> None:
    (problem,) = why_not_family({**OLMOE, "num_key_value_heads": 4}, Target())
    assert "it has 4 key-value heads, and SGLang's class a norm of k for 16" in str(problem)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Olmo2ForCausalLM"])
def test_other_families_run_on_several_ranks(architecture: str) -> None:
    assert why_not_family({**OLMOE, "architectures": [architecture]}, Target(tp_size=8)) == []


# of deepseek-ai/DeepSeek-V3's and zai-org/GLM-4.5-Air's config.json
DEEPSEEK: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "n_routed_experts": 256, "n_group": 8,
    "topk_group": 4, "num_experts_per_tok": 8, "topk_method": "noaux_tc", "norm_topk_prob": True,
}  # fmt: skip
GLM_AIR: dict[str, Any] = {
    "architectures": ["Glm4MoeForCausalLM"], "n_routed_experts": 128, "n_group": 1,
    "topk_group": 1, "num_experts_per_tok": 8, "norm_topk_prob": True,
}  # fmt: skip
TRITON_ROUTING = "SGLANG_OPT_USE_JIT_KERNEL_GROUPED_TOPK"


@pytest.fixture(autouse=True)
def no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TRITON_ROUTING, raising=False)


@pytest.mark.parametrize("gpu", ["A100", "RTX 3090", "RTX 2080 Ti"])
def test_deepseeks_routing_is_refused_where_flashinfer_has_it_not(gpu: str) -> None:
    (problem,) = why_not_family(DEEPSEEK, Target(gpu=find_gpu(gpu)))
    assert "with a kernel of FlashInfer's that GPUs of compute capability" in str(problem)
    assert str(problem).endswith(f"set {TRITON_ROUTING}=1 in the environment of the server")


def test_deepseeks_routing_runs_with_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRITON_ROUTING, "1")
    assert why_not_family(DEEPSEEK, Target(gpu=find_gpu("A100"))) == []


@pytest.mark.parametrize(
    ("config", "gpu"),
    [
        (DEEPSEEK, "RTX 4090"),
        (DEEPSEEK, "H100"),
        # not a power of two, and so another kernel: topk.py:2026
        ({**DEEPSEEK, "n_routed_experts": 192}, "A100"),
        # without groups, eight experts a token: topk.py:2030
        (GLM_AIR, "A100"),
        # DeepSeek-V2 has no correction bias
        ({**DEEPSEEK, "topk_method": "group_limited_greedy"}, "A100"),
    ],
)
def test_routing_that_runs_is_not_refused(config: dict[str, Any], gpu: str) -> None:
    assert why_not_family(config, Target(gpu=find_gpu(gpu))) == []


def test_routing_is_not_asked_for_without_a_gpu() -> None:
    assert why_not_family(DEEPSEEK, Target()) == []


@pytest.mark.parametrize(("method", "is_refused"), [("gptq", True), ("awq", False), ("fp8", False)])
def test_glms_shared_experts_need_a_weight_with_a_dtype(
    tmp_path: Path, method: str, is_refused: bool
) -> None:
    model = published.glm_4_5_air(num_layers=2).write(tmp_path / "m")
    made = plan(model, f'match: "*.shared_experts.*", method: {method}')
    refused = [
        "error: model.layers.1.mlp.shared_experts.gate_proj, "
        "model.layers.1.mlp.shared_experts.up_proj: SGLang's GLM-4-MoE looks at the dtype of their "
        "weight, and GPTQ has none; use method: fp8_block or awq"
    ]
    assert problem_texts(made) == (refused if is_refused else [])


def test_draft_models_shared_experts_are_not_asked_for(tmp_path: Path) -> None:
    """They are left to a draft model, packed or not."""
    model = published.glm_4_5_air(num_layers=2)
    block = "model.layers.2.mlp.shared_experts."
    packed = {
        f"{block}{name}.{suffix}": spec
        for name in ("gate_proj", "up_proj")
        for suffix, spec in {
            "qweight": ("I32", (512, 1408)), "qzeros": ("I32", (32, 176)),
            "scales": ("F16", (32, 1408)), "g_idx": ("I32", (4096,)),
        }.items()
    }  # fmt: skip
    floats = {name: spec for name, spec in model.tensors.items() if not name.startswith(block)}
    config = {
        **model.config,
        "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    }
    folder = published.Published(config, {**floats, **packed}, 1).write(tmp_path / "m")
    made = plan(folder, 'match: "*.experts.*", method: bf16')
    assert made.by_name[f"{block}up_proj"].kind == "draft"
    assert not [text for text in problem_texts(made) if "GLM" in text]


@pytest.mark.parametrize("key", ["head_dim", "hidden_size", "num_attention_heads", "vocab_size"])
def test_sizes_that_config_json_leaves_out_are_not_held_against_weights(
    tmp_path: Path, key: str
) -> None:
    folder = write_checkpoint(
        tmp_path / "model", llama_config(**{key: None}), llama_tensors(llama_config())
    )
    assert problem_texts(plan(folder, 'match: "*", method: fp8')) == []


def test_sizes_by_layer_are_not_held_against_weights(tmp_path: Path) -> None:
    config = llama_config(intermediate_size=[512, 512, 512], num_attention_heads=[4, 4, 4])
    folder = write_checkpoint(tmp_path / "model", config, llama_tensors(llama_config()))
    assert problem_texts(plan(folder, 'match: "*", method: fp8')) == []
