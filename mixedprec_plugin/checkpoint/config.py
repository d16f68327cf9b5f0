"""config.json of models with more than a language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What config.json says of the language model: its `text_config`, where it has one, goes first.

    Args:
        config: the parsed config.json.
    """
    text = config.get("text_config")
    return {**config, **text} if isinstance(text, Mapping) else config
