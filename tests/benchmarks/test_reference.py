"""The reference: reading a text in windows is reading it whole, and its norms round once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.rounding import round_as_kernels

TOKENS = torch.tensor([[1, 5, 7, 2]])


@pytest.fixture
def model() -> Any:
    """A small Llama of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("num_tokens", [4, 5, 9, 14])
def test_windows_give_the_log_probabilities_of_the_whole(model: Any, num_tokens: int) -> None:
    from benchmarks.reference_model import log_probabilities, windowed_log_probabilities

    tokens = torch.randint(0, 32, (num_tokens,)).tolist()
    whole = log_probabilities(model, tokens)
    torch.testing.assert_close(windowed_log_probabilities(model, tokens, 4), whole)


def test_in_float32_rounding_changes_nothing(model: Any) -> None:
    with torch.inference_mode():
        before = model(TOKENS).logits
        round_as_kernels(model)
        torch.testing.assert_close(model(TOKENS).logits, before)


def test_a_norm_in_bfloat16_is_the_rounded_float32_norm(model: Any) -> None:
    model.model.norm.weight.data = torch.rand(16).bfloat16().float()
    x = torch.randn(1, 3, 16)
    expected = model.model.norm(x).bfloat16()
    model.bfloat16()
    round_as_kernels(model)
    assert torch.equal(model.model.norm(x), expected)
