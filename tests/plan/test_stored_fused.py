"""Phi-3 stores its fused projections as such; the shards' sizes are those of its config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mixedprec_plugin.methods.interface import Target
from tests.headers import write_headers
from tests.presets import plan, problem_texts

BLOCK = "model.layers.0."


def phi3(folder: Path, **changes: Any) -> Path:
    """A layer with the sizes of microsoft/Phi-3-medium-4k-instruct."""
    config = {
        "architectures": ["SliceOfPhi3"], "model_type": "phi3", "hidden_size": 5120,
        "num_attention_heads": 40, "num_key_value_heads": 10, "intermediate_size": 17920,
        "num_hidden_layers": 1, "torch_dtype": "bfloat16", **changes,
    }  # fmt: skip
    tensors = {
        f"{BLOCK}self_attn.qkv_proj.weight": ("BF16", (7680, 5120)),
        f"{BLOCK}self_attn.o_proj.weight": ("BF16", (5120, 5120)),
        f"{BLOCK}mlp.gate_up_proj.weight": ("BF16", (35840, 5120)),
        f"{BLOCK}mlp.down_proj.weight": ("BF16", (5120, 17920)),
    }
    return write_headers(folder / "model", config, tensors)


def errors(model: Path, rule: str, tp_size: int) -> list[str]:
    made = plan(model, f'match: "*", {rule}', target=Target(tp_size=tp_size))
    return [text.partition(";")[0] for text in problem_texts(made)]


def test_whole_shards_fit(tmp_path: Path) -> None:
    model = phi3(tmp_path)
    for tp_size in (1, 2, 5, 10):
        assert errors(model, "method: fp8_block", tp_size) == []
    assert errors(model, "method: gptq", 1) == []


def test_blocks_must_fit_each_shard_and_not_the_sum_alone(tmp_path: Path) -> None:
    # 7680 / 4 is a multiple of 128, and 10 key heads do not split over 4 ranks
    assert errors(phi3(tmp_path), "method: fp8_block", 4) == [
        f"error: {BLOCK}self_attn.qkv_proj: N = 320 per rank of a shard of its fused module is not "
        "a multiple of 128, the block size along N"
    ]


def test_repeated_heads_are_not_split(tmp_path: Path) -> None:
    # 10 key heads on 20 ranks: each holds one of them whole
    found = errors(phi3(tmp_path), "method: fp8_block", 20)
    assert not any("N = 64 per rank" in text for text in found)


@pytest.mark.parametrize("heads", [8, 40])
def test_sizes_that_do_not_add_up_are_refused(tmp_path: Path, heads: int) -> None:
    kv = heads * 128
    model = phi3(tmp_path, num_key_value_heads=heads)
    assert errors(model, "method: bf16", 1) == [
        f"error: {BLOCK}self_attn.qkv_proj: is stored fused with 7680 rows (expected 5120 + {kv} + "
        f"{kv} = {5120 + 2 * kv} for q, k, v by config.json)"
    ]


def test_key_and_value_heads_are_the_language_models(tmp_path: Path) -> None:
    text = {"hidden_size": 5120, "num_attention_heads": 40, "num_key_value_heads": 10}
    model = phi3(tmp_path, hidden_size=1, num_attention_heads=None, text_config=text)
    assert errors(model, "method: fp8_block", 2) == []
