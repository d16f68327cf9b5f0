"""Decode speed of a running server."""

from __future__ import annotations

import time
from typing import Any

from mixedprec_plugin.evaluate.server import Server

NUM_TOKENS = 256


def decode_speed(server: Server, batch_size: int) -> float:
    """Return generated tokens a second over a batch of prompts, the first token's time left out.

    Args:
        batch_size: how many prompts decode at once.
    """
    _generate(server, batch_size, 8)
    first = _seconds(server, batch_size, 1)
    whole = _seconds(server, batch_size, NUM_TOKENS)
    return speed(batch_size, NUM_TOKENS, first, whole)


def speed(batch_size: int, num_tokens: int, first: float, whole: float) -> float:
    """Tokens a second, from the seconds for one token of each prompt and for `num_tokens`.

    Raises:
        ValueError: the longer generation took no longer.
    """
    if whole <= first:
        raise ValueError(f"{num_tokens} tokens took {whole} s (expected more than {first} s)")
    return batch_size * (num_tokens - 1) / (whole - first)


def _seconds(server: Server, batch_size: int, num_tokens: int) -> float:
    start = time.perf_counter()
    _generate(server, batch_size, num_tokens)
    return time.perf_counter() - start


def _generate(server: Server, batch_size: int, num_tokens: int) -> None:
    sampling = {"max_new_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    texts = [f"Chapter {number}. It was a day" for number in range(batch_size)]
    answers: Any = server.request("/generate", {"text": texts, "sampling_params": sampling})
    counts = [answer["meta_info"]["completion_tokens"] for answer in answers]
    assert counts == [num_tokens] * batch_size, counts
