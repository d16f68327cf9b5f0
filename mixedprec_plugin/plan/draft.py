"""Layers of a checkpoint that the model itself does not build: those that predict further tokens.

DeepSeek-V3 and GLM-4.5 store a layer of multi-token prediction behind their last decoder layer,
Qwen3-Next one below `mtp`. A draft model of speculative decoding is made of it.

Source: SGLang passes over tensors of layers from `num_hidden_layers` on where
`num_nextn_predict_layers` is set (models/deepseek_common/deepseek_weight_loader.py:337,
models/glm4_moe.py:1148), and over those whose name holds "mtp" (models/qwen3_next.py:1186).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from mixedprec_plugin.checkpoint.config import text_config

NOTE = "left to a draft model"

_DECODER_LAYER = re.compile(r"(?:(?:model|language_model)\.)+layers\.(\d+)\.")


def draft_layers(config: Mapping[str, Any], names: Iterable[str]) -> frozenset[str]:
    """Find the layers that only a draft model runs.

    Args:
        config: the model's config.json.
        names: its layer names.
    """
    said = text_config(config)
    num_layers, num_draft = said.get("num_hidden_layers"), said.get("num_nextn_predict_layers")
    first = num_layers if isinstance(num_layers, int) and num_draft else None
    return frozenset(name for name in names if _is_draft(name, first))


def _is_draft(name: str, first: int | None) -> bool:
    if name.startswith("mtp."):
        return True
    match = _DECODER_LAYER.match(name) if first is not None else None
    return match is not None and first is not None and int(match[1]) >= first
