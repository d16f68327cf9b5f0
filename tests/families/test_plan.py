"""What the plan refuses of a whole family."""

from __future__ import annotations

from typing import Any

import pytest

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
