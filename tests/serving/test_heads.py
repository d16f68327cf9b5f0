"""`lm_head` in a method: built, filled, padded, split over ranks, and what it computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mixedprec_plugin.errors import PlanError
from mixedprec_plugin.methods.interface import Target
from tests.checkpoints import llama_config, llama_tensors, write_checkpoint, write_mixtral
from tests.cpu.context import one_of_two_ranks
from tests.presets import open_virtual_checkpoint, write_preset
from tests.reference.dequantize import dequantize_method

pytestmark = pytest.mark.usefixtures("sglang_context")

LoadModel = Callable[..., Any]
HIDDEN = llama_config()["hidden_size"]
RULES = {
    "awq": ("method: awq, group_size: 64", {"group_size": 64}),
    "gptq": ("method: gptq, group_size: 64", {"bits": 4, "group_size": 64}),
    "gptq_int8": ("method: gptq_int8, group_size: 64", {"bits": 8, "group_size": 64}),
    "nvfp4": ("method: nvfp4", {"keep_input_scale": False}),
}


def write(folder: Path, vocabulary: int, *, ties: bool) -> Path:
    """A Llama whose head is random, or the embedding; of 256 tokens, with a copy beside it."""
    config = llama_config(vocab_size=vocabulary, tie_word_embeddings=ties)
    tensors = llama_tensors(config)
    if ties and vocabulary == 256:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    return write_checkpoint(folder, config, tensors)


def logits_of(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """As SGLang computes them on one rank."""
    logits: torch.Tensor = model.logits_processor._compute_lm_head(hidden, model.lm_head)
    return logits


def expected(model: Path, preset: Path, method: str, hidden: torch.Tensor) -> np.ndarray:
    """By what is stored of the head, dequantized by code of the tests'."""
    stream = dict(iter(open_virtual_checkpoint(model, preset, Target(device="cpu"))))
    held = {
        name.removeprefix("lm_head."): (t.float() if t.is_floating_point() else t).numpy()
        for name, t in stream.items()
        if name.startswith("lm_head.")
    }
    assert {"qweight", "weight_scale_2"} & held.keys()
    weight = dequantize_method(method.removesuffix("_int8"), held, RULES[method][1])
    return hidden.double().numpy() @ weight.astype(np.float64).T


@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("vocabulary", [256, 312])
@pytest.mark.parametrize("method", RULES)
def test_logits_are_those_of_the_dequantized_head(
    load_model: LoadModel, tmp_path: Path, method: str, vocabulary: int, ties: bool
) -> None:
    """312 tokens are padded to 320, by rows of zeros."""
    model = write(tmp_path / "model", vocabulary, ties=ties)
    head = "untie_lm_head: true\n" if ties else ""
    preset = write_preset(tmp_path, f'match: "lm_head", {RULES[method][0]}', head=head)
    served = load_model(model, preset)
    assert "LinearMethod" in type(served.lm_head.quant_method).__name__
    assert served.lm_head is not served.model.embed_tokens
    hidden = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits = logits_of(served, hidden)
    exact = expected(model, preset, method, hidden)
    assert logits.shape == (5, -(-vocabulary // 64) * 64)
    assert not logits[:, vocabulary:].any()
    error = logits[:, :vocabulary].double().numpy() - exact
    assert np.sqrt((error**2).mean() / (exact**2).mean()) < 0.004


@pytest.mark.parametrize("method", RULES)
def test_ranks_have_their_parts_of_the_vocabulary(
    load_model: LoadModel, tmp_path: Path, method: str
) -> None:
    """312 tokens over two ranks of 160: the second has 152, and 8 rows of zeros."""
    from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead

    from mixedprec_plugin.methods.construct import build_config
    from mixedprec_plugin.methods.registry import bind
    from mixedprec_plugin.serving.placement import _fill_head

    model = write(tmp_path / "model", 312, ties=False)
    preset = write_preset(tmp_path, f'match: "lm_head", {RULES[method][0]}')
    stream = dict(iter(open_virtual_checkpoint(model, preset, Target(device="cpu"))))
    hidden = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(0)).bfloat16()
    config = build_config(*bind(method, {} if method == "nvfp4" else {"group_size": 64}), "cpu")
    parts = []
    for rank in range(2):
        with one_of_two_ranks(rank):
            head = ParallelLMHead(
                312, HIDDEN, params_dtype=torch.bfloat16, quant_config=config, prefix="lm_head"
            )
        for suffix, parameter in list(head.named_parameters()):
            _fill_head(head, parameter, stream[f"lm_head.{suffix}"])
        head.quant_method.process_weights_after_loading(head)
        parts.append(head.quant_method.apply(head, hidden))
    logits = torch.cat(parts, dim=1)
    assert logits.shape == (5, 320)
    assert not logits[:, 312:].any()
    exact = expected(model, preset, method, hidden)
    error = logits[:, :312].double().numpy() - exact
    assert np.sqrt((error**2).mean() / (exact**2).mean()) < 0.004


def test_head_that_sglangs_class_asks_no_one_about_is_refused(
    load_model: LoadModel, tmp_path: Path
) -> None:
    """Mixtral's is built without a quantization config (models/mixtral.py)."""
    model = write_mixtral(tmp_path / "model", num_hidden_layers=1)
    preset = write_preset(tmp_path, 'match: "lm_head", method: gptq, group_size: 64')
    with pytest.raises(PlanError, match=r"lm_head \(ParallelLMHead\), and asks no one what it"):
        load_model(model, preset)
