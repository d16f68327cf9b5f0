"""Two ranks, or two pipeline stages, give the tokens of one.

In float16 with float32 logits: bfloat16 logits are so coarse (steps of 0.125) that the two best
tokens tie every few steps, and then the last bit of an all-reduce decides. That is so for the
stock bf16 model without this plugin, too.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from benchmarks import tensor_parallel
from mixedprec_plugin.evaluate.server import Server
from tests.server.conftest import MIXED, greedy

PROMPTS = tensor_parallel.PROMPTS[:5]
FLAGS = ("--dtype", "float16", "--enable-fp32-lm-head")


Tokens = dict[str, list[int]]


@pytest.fixture(scope="module")
def tokens_of_one_rank(widened_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    return serve(widened_model, tmp_path_factory.mktemp("one") / "server.log")


@pytest.fixture
def untied_model(widened_model: Path, tmp_path: Path) -> Path:
    """The same model with its head written out: SGLang's Llama cannot tie it over two stages."""
    folder = tmp_path / "untied"
    shutil.copytree(widened_model, folder)
    tensors = load_file(widened_model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    return folder


def serve(model: Path, log_path: Path, *flags: str) -> Tokens:
    with Server(model, log_path, MIXED, [*FLAGS, *flags]) as server:
        return {prompt: greedy(server, prompt) for prompt in PROMPTS}


def test_two_ranks_give_the_tokens_of_one_in_every_method(
    widened_model: Path, tmp_path: Path, tokens_of_one_rank: Tokens
) -> None:
    assert serve(widened_model, tmp_path / "log", "--tp", "2") == tokens_of_one_rank


def test_two_stages_read_their_own_layers_and_give_the_tokens_of_one(
    untied_model: Path, tmp_path: Path, tokens_of_one_rank: Tokens
) -> None:
    log_path = tmp_path / "log"
    assert serve(untied_model, log_path, "--pp-size", "2") == tokens_of_one_rank
    log = log_path.read_text()
    assert "PP0] mixedprec: this pipeline stage reads 137 of 273 layers, 304.4 of 457.8 MB" in log
    assert "PP1] mixedprec: this pipeline stage reads 137 of 273 layers, 228.9 of 457.8 MB" in log
    assert log.count(f"mixedprec: {MIXED} over") == 1
