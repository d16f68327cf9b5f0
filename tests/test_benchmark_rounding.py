"""The reference's norms round once, and keep the function of transformers' own."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.rounding import round_as_kernels

CONFIG = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)
TOKENS = torch.tensor([[1, 5, 7, 2]])


def test_in_float32_nothing_changes() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).eval()
    with torch.inference_mode():
        before = model(TOKENS).logits
        round_as_kernels(model)
        torch.testing.assert_close(model(TOKENS).logits, before)


def test_a_norm_in_bfloat16_is_the_rounded_float32_norm() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).eval()
    model.model.norm.weight.data = torch.rand(16).bfloat16().float()
    x = torch.randn(1, 3, 16)
    expected = model.model.norm(x).bfloat16()
    model.bfloat16()
    round_as_kernels(model)
    assert torch.equal(model.model.norm(x), expected)
