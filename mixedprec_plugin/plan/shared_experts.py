"""Shared experts that SGLang by itself would run as one more routed expert.

With a preset they are layers of their own on every GPU: they follow their own rules, and a plan
does not depend on the GPU that it is carried out on. The same weights are read and multiplied; a
layer launches three kernels more (two products, an activation), which SGLang runs on a second
stream beside the routed experts (models/deepseek_v2.py:867).

Source: `shared_experts_fusion_disable_reason` of models/deepseek_v2.py:3315, glm4_moe.py:1012.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mixedprec_plugin.plan.folding import fold_names, natural_key
from mixedprec_plugin.plan.model import PlannedLayer


def shared_experts_line(config: Mapping[str, Any], layers: Iterable[PlannedLayer]) -> str:
    """Say so where SGLang would fuse shared experts on a GPU if there were no preset.

    Args:
        config: the model's config.json.
        layers: the plan's.
    Returns:
        a line for people; empty where SGLang would not, either.
    """
    architecture = (config.get("architectures") or [""])[0]
    is_fusible = config.get("n_shared_experts") == 1 and (
        architecture == "Glm4MoeForCausalLM"
        or (architecture == "DeepseekV3ForCausalLM" and config.get("n_routed_experts") == 256)
    )
    names = {
        layer.module
        for layer in layers
        if ".mlp.shared_experts." in layer.name and layer.kind != "draft"
    }
    if not is_fusible or not names:
        return ""
    where = ", ".join(fold_names(sorted(names, key=natural_key)))
    return f"{where}: not fused into the routed experts, they follow their own rules"
