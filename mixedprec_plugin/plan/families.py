"""What SGLang's class of one architecture cannot run, whatever its layers run in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mixedprec_plugin.errors import Problem
from mixedprec_plugin.plan.folding import fold_names
from mixedprec_plugin.plan.model import PlannedLayer, Target


def why_not_family(
    config: Mapping[str, Any], target: Target, layers: Sequence[PlannedLayer] = ()
) -> list[Problem]:
    """List what keeps SGLang from running the model of a config.json at all.

    Source: models/olmoe.py:155, 191: OLMoE's norms of q and k are as wide as the hidden state, and
    are applied to a rank's part of the heads.
    """
    architecture = (config.get("architectures") or [""])[0]
    if architecture == "Glm4MoeForCausalLM":
        return _glm4_problems(layers)
    if architecture != "OlmoeForCausalLM":
        return []
    problems = []
    if target.tp_size > 1:
        text = (
            f"SGLang's {architecture} normalizes the heads of q and k together, and does not on "
            f"{target.tp_size} tensor-parallel ranks"
        )
        remedy = "serve it on one, or on more with --dp"
        problems.append(Problem(architecture, text, remedy, "family"))
    num_heads = config.get("num_attention_heads")
    num_kv_heads = config.get("num_key_value_heads") or num_heads
    if num_heads != num_kv_heads:
        text = (
            f"it has {num_kv_heads} key-value heads, and SGLang's class a norm of k for "
            f"{num_heads} (num_key_value_heads in config.json)"
        )
        problems.append(Problem(architecture, text, "SGLang cannot serve it", "family"))
    return problems


def _glm4_problems(layers: Sequence[PlannedLayer]) -> list[Problem]:
    """GPTQ on shared experts, whose weight's dtype the model asks for (glm4_moe.py:503)."""
    names = [
        layer.name
        for layer in layers
        if layer.method == "gptq" and layer.module.endswith(".shared_experts.gate_up_proj")
    ]
    text = "SGLang's GLM-4-MoE looks at the dtype of their weight, and GPTQ has none"
    remedy = "use method: fp8_block or awq"
    return [Problem(folded, text, remedy, "family") for folded in fold_names(names)]
