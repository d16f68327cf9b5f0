"""Two ranks give the tokens of one.

In float16 with float32 logits: bfloat16 logits are so coarse (steps of 0.125) that the two best
tokens tie every few steps, and then the last bit of an all-reduce decides. That is so for the
stock bf16 model without this plugin, too.
"""

from __future__ import annotations

from pathlib import Path

from demo.server import Server
from tests.server.conftest import MIXED, greedy

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a little girl who",
    "The three primary colors are",
    "In 1969, the first man",
    "The largest planet in the solar system is",
)
FLAGS = ("--dtype", "float16", "--enable-fp32-lm-head")


def test_two_ranks_give_the_tokens_of_one_in_every_method(
    widened_model: Path, tmp_path: Path
) -> None:
    tokens = {}
    for tp_size in (1, 2):
        log_path = tmp_path / f"{tp_size}.log"
        with Server(widened_model, log_path, MIXED, [*FLAGS, "--tp", str(tp_size)]) as server:
            tokens[tp_size] = {prompt: greedy(server, prompt) for prompt in PROMPTS}
    assert tokens[1] == tokens[2]
