"""What config.json leaves to a model's class, held against transformers' classes."""

from __future__ import annotations

import pytest

from mixedprec_plugin.families.config import _TIED, ties_head
from mixedprec_plugin.families.table import FAMILIES

# transformers has no class of the first three; the next is never alone, and SGLang asks the larger
# model (models/qwen3_vl.py:1349); the last has an encoder
_OTHERS = {"baichuan", "kimi_k2", "minicpm", "qwen3_vl_moe_text", "t5gemma"}
# which are asked above their `text_config`
_ABOVE = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"}
_KNOWN = {name for family in FAMILIES for name in family.model_types}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted((_TIED | _KNOWN) - _OTHERS))
def test_head_is_tied_by_default_as_in_transformers(name: str) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    whole = CONFIG_MAPPING[name]()
    text = whole if name in _ABOVE else whole.get_text_config()
    # a class whose larger model is asked has none of its own
    assert ties_head({"model_type": name}) == bool(getattr(text, "tie_word_embeddings", False))


@pytest.mark.parametrize(
    ("config", "ties"),
    [
        ({"model_type": "gemma2", "tie_word_embeddings": False}, False),
        ({"model_type": "llama", "tie_word_embeddings": True}, True),
        ({"model_type": "llava", "text_config": {"tie_word_embeddings": True}}, True),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, True),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, False),
        ({"model_type": "qwen3_vl_moe", "text_config": {"tie_word_embeddings": True}}, False),
        ({"model_type": "gemma", "tie_word_embeddings": None}, True),
        ({}, False),
    ],
)
def test_what_config_json_says_goes_first(config: dict[str, object], ties: bool) -> None:
    assert ties_head(config) is ties
