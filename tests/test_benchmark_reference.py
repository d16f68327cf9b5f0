"""Reading a text in windows is reading it whole."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.reference_model import log_probabilities, windowed_log_probabilities


@pytest.mark.parametrize("num_tokens", [4, 5, 9, 14])
def test_windows_give_the_log_probabilities_of_the_whole(num_tokens: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 32, (num_tokens,)).tolist()
    whole = log_probabilities(model, tokens)
    torch.testing.assert_close(windowed_log_probabilities(model, tokens, 4), whole)
