"""What the plan refuses of a whole family."""

from __future__ import annotations

from typing import Any

import pytest

from mixedprec_plugin.methods.cards import find_gpu
from mixedprec_plugin.plan.families import why_not_family
from mixedprec_plugin.plan.model import Target

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
