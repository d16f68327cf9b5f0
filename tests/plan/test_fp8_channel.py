"""What the plan says of per-channel FP8 where SGLang's models have ways of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixedprec_plugin.methods.cards import find_gpu
from mixedprec_plugin.methods.interface import Target
from tests.checkpoints import write_checkpoint, write_llama
from tests.presets import plan, problem_texts

ATTENTION = {"q_a_proj": 256, "kv_a_proj_with_mqa": 192, "q_b_proj": 512, "kv_b_proj": 512}
CPU = Target(device="cpu")


@pytest.fixture
def latent(tmp_path: Path) -> Path:
    """The projections of a block with multi-head latent attention."""
    tensors = {
        f"model.layers.0.self_attn.{name}.weight": torch.randn(N, 256).bfloat16()
        for name, N in ATTENTION.items()
    }
    config = {"model_type": "deepseek_v3", "torch_dtype": "bfloat16"}
    return write_checkpoint(tmp_path / "model", config, tensors)


def test_latent_attention_runs_in_it_on_cuda(latent: Path) -> None:
    """kv_b_proj: models/deepseek_common/deepseek_weight_loader.py, channel_quant_to_tensor_quant.

    q_a and kv_a are one layer in SGLang, with a scale a channel, or one for each of the two.
    """
    made = plan(latent, 'match: "*", method: fp8_channel')
    assert not made.problems
    module = made.modules["model.layers.0.self_attn.fused_qkv_a_proj_with_mqa"]
    assert [layer.outputs["weight_scale"].shape for layer in module] == [(256, 1), (192, 1)]
    assert not plan(latent, 'match: "*", method: fp8').problems


def test_latent_attention_is_absorbed_unquantized_on_the_cpu(latent: Path) -> None:
    (text,) = problem_texts(plan(latent, 'match: "*", method: fp8_channel', target=CPU))
    assert "kv_b_proj cannot be absorbed in fp8_channel: the CPU platform absorbs it" in text
    rules = ('match: "*", method: fp8_channel', 'match: "*.kv_b_proj", method: bf16')
    assert not plan(latent, *rules, target=CPU).problems


@pytest.mark.parametrize(("gpu", "runs"), [("A100", False), ("L4", True), ("RTX 5090", True)])
def test_gpu_needs_fp8_arithmetic(tmp_path: Path, gpu: str, runs: bool) -> None:
    model = write_llama(tmp_path / "model")
    made = plan(model, 'match: "*_proj", method: fp8_channel', target=Target(gpu=find_gpu(gpu)))
    texts = [str(problem) for problem in made.errors]
    assert bool(texts) is not runs
    for text in texts:
        assert "fp8_channel does not run on this GPU, whose compute capability is 8.0" in text
        assert "; use method: fp8 or gptq or int8_channel or blockwise_int8 or" in text


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_widths_that_no_block_divides_run_on_any_number_of_ranks(
    tmp_path: Path, tp_size: int
) -> None:
    """SmolLM2-135M: 576 = 9 heads of 64, 192 = 3, and 1536."""
    sizes = {"q_proj": 576, "k_proj": 192, "v_proj": 192, "o_proj": 576}
    tensors = {
        f"model.layers.0.self_attn.{name}.weight": torch.randn(N, 576).bfloat16()
        for name, N in sizes.items()
    }
    config = {"torch_dtype": "bfloat16", "num_key_value_heads": 3}
    model = write_checkpoint(tmp_path / "model", config, tensors)
    target = Target(tp_size=tp_size)
    assert not plan(model, 'match: "*.o_proj", method: fp8_channel', target=target).problems
    if tp_size == 1:
        assert not plan(model, 'match: "*", method: fp8_channel').problems
        assert plan(model, 'match: "*", method: fp8_block').errors
