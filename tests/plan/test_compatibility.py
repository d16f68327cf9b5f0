from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import llama_config, llama_tensors, write_checkpoint
from tests.plan.mixtures import mixed_plan
from tests.presets import problem_texts

RULE = 'match: "model.layers.0.self_attn.*_proj", method: bf16, source: other'


def write(path: Path, tensors: Mapping[str, torch.Tensor] | None = None, **changes: Any) -> Path:
    config = llama_config()
    whole = llama_tensors(config) | dict(tensors or {})
    return write_checkpoint(path, {**config, **changes}, whole)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write(tmp_path / "model")


def texts(model: Path, other: Path, head: str = "") -> list[str]:
    return problem_texts(mixed_plan(model, RULE, head=head, other=other))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"torch_dtype": "float16", "transformers_version": "9.9", "use_cache": False},
        {"max_position_embeddings": 1 << 20, "rope_scaling": {"rope_type": "yarn", "factor": 4}},
        {"vocab_size": 384},
        {"rope_theta": None, "rope_parameters": {"rope_theta": 10000.0}},
        {"rms_norm_eps": 0.00001},
        {"head_dim": None},
    ],
)
def test_harmless_differences_are_none(
    tmp_path: Path, model: Path, changes: dict[str, Any]
) -> None:
    assert texts(model, write(tmp_path / "other", **changes)) == []


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (
            {"architectures": ["MistralForCausalLM"]},
            "its architecture is MistralForCausalLM (expected LlamaForCausalLM)",
        ),
        ({"num_hidden_layers": 4}, "num_hidden_layers is 4 (expected 3)"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 4 (expected 2)"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06 (expected 1e-05)"),
        ({"vocab_size": 5000}, "vocab_size is 5000 (expected 320)"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False (expected True)"),
        ({"text_config": {"hidden_size": 512}}, "hidden_size is 512 (expected 256)"),
    ],
)
def test_other_sizes_are_an_error_at_the_sources_line(
    tmp_path: Path, model: Path, changes: dict[str, Any], what: str
) -> None:
    other = write(tmp_path / "other", **changes)
    (text,) = texts(model, other)
    preset = tmp_path / "presets" / "preset.yaml"
    assert text == (
        f"error: {preset}:3: sources.other: is a checkpoint of another model than {model}: {what}; "
        "take a checkpoint of the same model, or set trust_sources: true"
    )


def test_rope_theta_is_compared_wherever_it_stands(tmp_path: Path) -> None:
    model = write(tmp_path / "model", rope_theta=10000.0)
    other = write(tmp_path / "other", rope_parameters={"rope_theta": 500000.0})
    assert "rope_theta is 500000.0 (expected 10000.0)" in texts(model, other)[0]


def test_every_difference_is_told_at_once(tmp_path: Path, model: Path) -> None:
    other = write(tmp_path / "other", num_hidden_layers=4, rms_norm_eps=1e-6)
    (text,) = texts(model, other)
    assert "num_hidden_layers is 4 (expected 3); rms_norm_eps is 1e-06 (expected 1e-05)" in text


def test_trusted_source_is_a_warning(tmp_path: Path, model: Path) -> None:
    other = write(tmp_path / "other", num_hidden_layers=4)
    (text,) = texts(model, other, "trust_sources: true\n")
    assert text.startswith("warning: ")
    assert "num_hidden_layers is 4" in text


def test_layer_of_another_shape_is_an_error(tmp_path: Path, model: Path) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    other = write(tmp_path / "other", {name: torch.zeros(256, 128, dtype=torch.bfloat16)})
    assert (
        "model.layers.0.self_attn.o_proj is [256, 128] (expected [256, 256])"
        in (texts(model, other)[0])
    )


def test_other_embedding_is_another_model(tmp_path: Path, model: Path) -> None:
    generator = torch.Generator().manual_seed(9)
    rows = torch.randn(320, 256, generator=generator).bfloat16()
    other = write(tmp_path / "other", {"model.embed_tokens.weight": rows})
    assert "16 of 16 sampled rows of model.embed_tokens differ (cosine " in texts(model, other)[0]


def test_embedding_that_is_rounded_or_padded_is_the_same(tmp_path: Path, model: Path) -> None:
    name = "model.embed_tokens.weight"
    rows = llama_tensors(llama_config())[name]
    padded = torch.cat([rows.half(), torch.zeros(64, 256, dtype=torch.float16)])
    assert texts(model, write(tmp_path / "other", {name: padded}, vocab_size=384)) == []


def test_norm_of_other_signs_is_another_model(tmp_path: Path, model: Path) -> None:
    name = "model.layers.1.input_layernorm.weight"
    weight = llama_tensors(llama_config())[name]
    other = write(tmp_path / "other", {name: -weight})
    assert "the signs of model.layers.1.input_layernorm differ" in texts(model, other)[0]
