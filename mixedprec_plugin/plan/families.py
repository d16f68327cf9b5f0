"""What SGLang's class of one architecture cannot run, whatever its layers run in."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from mixedprec_plugin.errors import Problem
from mixedprec_plugin.methods.cards import version
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.plan.folding import fold_names
from mixedprec_plugin.plan.model import PlannedLayer

# SGLang's own kernel for tokens that are routed by groups of experts (environ.py:1485)
_TRITON_ROUTING = "SGLANG_OPT_USE_JIT_KERNEL_GROUPED_TOPK"


def why_not_family(
    config: Mapping[str, Any], target: Target, layers: Sequence[PlannedLayer] = ()
) -> list[Problem]:
    """List what keeps SGLang from running the model of a config.json at all.

    Source: models/olmoe.py:155, 191: OLMoE's norms of q and k are as wide as the hidden state, and
    are applied to a rank's part of the heads.
    """
    architecture = (config.get("architectures") or [""])[0]
    problems = _routing_problems(architecture, config, target)
    if architecture == "Glm4MoeForCausalLM":
        return problems + _glm4_problems(layers)
    if architecture != "OlmoeForCausalLM":
        return problems
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


def _routing_problems(
    architecture: str, config: Mapping[str, Any], target: Target
) -> list[Problem]:
    """DeepSeek-V3's routing, for which SGLang takes FlashInfer's kernel and does not ask the GPU.

    Source: `biased_grouped_topk_gpu` (layers/moe/topk.py:2021) of SGLang 0.5.23;
    FlashInfer's fused_moe/fused_routing_dsv3.py:66.
    """
    gpu = target.gpu
    if gpu is None or gpu.capability >= 89 or not _is_routed_by_flashinfer(architecture, config):
        return []
    text = (
        "SGLang routes its tokens with a kernel of FlashInfer's that GPUs of compute capability "
        f"{version(gpu.capability)} do not have (expected 8.9 or more)"
    )
    if os.environ.get(_TRITON_ROUTING, "").lower() in ("1", "true", "t", "yes", "y", "on"):
        return []
    remedy = f"set {_TRITON_ROUTING}=1 in the environment of the server"
    return [Problem(architecture, text, remedy, "family")]


def _is_routed_by_flashinfer(architecture: str, config: Mapping[str, Any]) -> bool:
    """Whether the conditions hold under which SGLang takes FlashInfer's kernel.

    Without groups they do not: a token would need to go to one expert.
    """
    num_experts, top_k = config.get("n_routed_experts") or 0, config.get("num_experts_per_tok") or 0
    groups, chosen = config.get("n_group") or 1, config.get("topk_group") or 1
    is_biased = config.get("topk_method") == "noaux_tc" or architecture == "Glm4MoeForCausalLM"
    if not is_biased or groups < 2 or not num_experts or not config.get("norm_topk_prob", True):
        return False
    in_group = num_experts // groups
    fits = in_group <= 32 and in_group * chosen <= 128
    return fits and not num_experts & (num_experts - 1) and top_k <= min(8, chosen * groups)


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
