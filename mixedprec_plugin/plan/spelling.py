"""Checkpoints whose tensors are spelled in a way that SGLang's class of the model does not load."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mixedprec_plugin.errors import Problem
from mixedprec_plugin.plan.folding import fold_names
from mixedprec_plugin.plan.model import PlannedLayer

_QWEN_VL = ((re.compile(r"model\.(language_model|visual)\."), "rename model.language_model.* to "
             "model.* and model.visual.* to visual.*"),)  # fmt: skip
# SGLang 0.5.23 ends in a KeyError of these names, with a preset or without
_NOT_LOADED: Mapping[str, tuple[tuple[re.Pattern[str], str], ...]] = {
    "Qwen2VLForConditionalGeneration": _QWEN_VL,
    "Qwen2_5_VLForConditionalGeneration": _QWEN_VL,
    "Gemma3ForConditionalGeneration": (
        (
            re.compile(r"model\.(language_model|vision_tower|multi_modal_projector)\."),
            "rename model.language_model.* to language_model.model.*, and take model. off the rest",
        ),
        (
            re.compile(r"vision_tower\.(?!vision_model\.)"),
            "rename vision_tower.* to vision_tower.vision_model.*",
        ),
    ),
}


def why_not_spelled(config: Mapping[str, Any], layers: Sequence[PlannedLayer]) -> list[Problem]:
    """Find names that transformers wrote since 4.52, which SGLang's models do not know.

    Args:
        config: the model's config.json.
        layers: the plan's.
    """
    architecture = (config.get("architectures") or [""])[0]
    problems = []
    for pattern, remedy in _NOT_LOADED.get(architecture, ()):
        names = [layer.name for layer in layers if pattern.match(layer.name)]
        if names:
            text = f"SGLang's {architecture} does not load tensors that are called so"
            where = ", ".join(fold_names(names)[:3])
            problems.append(Problem(where, text, f"{remedy} in the checkpoint", "family"))
    return problems
